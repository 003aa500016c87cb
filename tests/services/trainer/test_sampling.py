"""Drawing and log-probabilities are two sides of one policy."""

import numpy as np
import pytest
import torch

from services.trainer.core import sampling
from services.trainer.core.sampling import Vocabulary, draw, log_probs, sequences
from shared.codes import GROUP, LINGUISTIC_SIZE, split
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


@pytest.mark.parametrize("is_static", [False, True])
def test_an_answer_is_the_one_drawn_alone_however_early_others_end(
    fresh, tokenizer, monkeypatch: pytest.MonkeyPatch, is_static: bool
) -> None:
    monkeypatch.setattr(sampling, "keeps_shapes", lambda _: is_static)
    model, vocabulary = fresh(), Vocabulary(tokenizer.audio_offset, tokenizer.eos)
    prompts, limits = [np.array(tokenizer.encode_chat(make_row(i).turns()), np.int64) for i in range(4)], [1, 6, 3, 6]
    together = draw(model, prompts, limits, vocabulary, temperature=0.0)
    for prompt, limit, answer in zip(prompts, limits, together, strict=True):
        [alone] = draw(model, [prompt], [limit], vocabulary, temperature=0.0)
        np.testing.assert_array_equal(answer.mixed, alone.mixed)
        assert answer.ended == alone.ended


def test_tokens_are_drawn_as_often_as_they_are_likely(fresh, tokenizer) -> None:
    model, vocabulary, draws = fresh(), Vocabulary(tokenizer.audio_offset, tokenizer.eos), 20_000
    hidden = torch.randn(1, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    logits = sampling._logits(model, hidden, 0, LINGUISTIC_SIZE, True, vocabulary)[0]
    temperature = float(logits.detach().std()) / 3  # some are far likelier than others
    expected = torch.softmax(logits / temperature, -1)
    picked, is_end = sampling._pick(model, hidden.expand(draws, -1), GROUP, vocabulary, temperature,
                                    torch.Generator().manual_seed(0))  # fmt: skip
    found = torch.bincount(torch.where(is_end, LINGUISTIC_SIZE, picked), minlength=LINGUISTIC_SIZE + 1) / draws
    likeliest = expected.topk(8).indices
    error = (expected * (1 - expected) / draws).sqrt()
    assert bool(((found - expected).abs() < 5 * error + 1e-4)[likeliest].all())
    assert float(expected[found == 0].detach().max()) < 0.01
