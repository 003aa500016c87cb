"""Drawing and log-probabilities are two sides of one policy."""

import numpy as np
import torch

from services.trainer.core.sampling import Vocabulary, draw, log_probs, sequences
from shared.codes import split
from tests.services.trainer.conftest import make_row


def setup(tokenizer, count=5):
    prompts = [np.array(tokenizer.encode_chat(make_row(i).turns())) for i in range(count)]
    return prompts, Vocabulary(tokenizer.audio_offset, tokenizer.eos)


def test_answers_are_whole_groups_within_their_limits_and_repeat_with_the_seed(fresh, tokenizer) -> None:
    prompts, vocabulary = setup(tokenizer)
    limits = [1, 2, 3, 4, 5]
    answers = draw(fresh(), prompts, limits, vocabulary, seed=4)
    for answer, limit in zip(answers, limits, strict=True):
        split(answer.mixed)
        assert 1 <= len(answer.mixed) // 5 <= limit
    again = draw(fresh(), prompts, limits, vocabulary, seed=4)
    assert [a.mixed.tolist() for a in answers] == [a.mixed.tolist() for a in again]
    other = draw(fresh(), prompts, limits, vocabulary, seed=5)
    assert [a.mixed.tolist() for a in answers] != [a.mixed.tolist() for a in other]


def test_greedy_answers_are_the_likeliest_tokens_under_the_log_probs(fresh, tokenizer) -> None:
    model = fresh()
    prompts, vocabulary = setup(tokenizer, 3)
    answers = [a.mixed for a in draw(model, prompts, [3] * 3, vocabulary, temperature=0.0)]
    batch = sequences(prompts, answers, [3] * 3, vocabulary, "cpu")
    with torch.no_grad():
        best, _ = log_probs(model, batch, vocabulary)
        for place in range(1, 4):  # any other token in that place is less likely
            others = [a.copy() for a in answers]
            for other in others:
                other[place] = other[place] + 1 if other[place] % 1024 < 1000 else other[place] - 1
            worse, _ = log_probs(model, sequences(prompts, others, [3] * 3, vocabulary, "cpu"), vocabulary)
            assert (worse[:, place] < best[:, place]).all()


def test_log_probs_are_those_of_the_masked_softmax(fresh, tokenizer) -> None:
    model = fresh()
    prompts, vocabulary = setup(tokenizer, 2)
    answers = [make_row(0).target.mixed[:10], make_row(1).target.mixed[:15]]
    batch = sequences(prompts, answers, [3, 3], vocabulary, "cpu")
    with torch.no_grad():
        got, entropy = log_probs(model, batch, vocabulary, temperature=0.7)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids = np.concatenate([prompt, answer + vocabulary.offset, [vocabulary.eos]])
            logits = model(torch.from_numpy(ids)[None])[1][0].double() / 0.7
            for t, token in enumerate(ids[len(prompt) :]):
                start = vocabulary.offset + (0 if t % 5 < 2 else 1024)
                choices = list(range(start, start + (1024 if t % 5 < 2 else 4096)))
                choices += [vocabulary.eos] if t % 5 == 0 and t else []
                if t == 15:
                    choices = [vocabulary.eos]  # at the limit the end is forced
                log_p = torch.log_softmax(logits[len(prompt) - 1 + t, choices], -1)
                expected = log_p[choices.index(int(token))]
                torch.testing.assert_close(got[row, t].double(), expected, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(entropy[row, t].double(), -(log_p.exp() * log_p).sum(), rtol=1e-3, atol=1e-3)
    assert (got[0, 11:] == 0).all()


def test_rows_of_a_batch_score_alike_alone(fresh, tokenizer) -> None:
    model = fresh()
    prompts, vocabulary = setup(tokenizer, 3)
    answers = [make_row(i).target.mixed[: 5 * (i + 1)] for i in range(3)]
    batch = sequences(prompts, answers, [4] * 3, vocabulary, "cpu")
    with torch.no_grad():
        together, _ = log_probs(model, batch, vocabulary)
        alone, _ = log_probs(model, batch.rows(torch.tensor([1])), vocabulary)
    torch.testing.assert_close(alone[0], together[1, : alone.shape[1]], rtol=1e-4, atol=1e-5)
