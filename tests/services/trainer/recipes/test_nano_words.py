"""What an answer says better than others is reinforced, and only where it is said."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from services.trainer.core.branches import branches, states_before
from services.trainer.core.sampling import Answer, Vocabulary, draw, log_probs_after
from services.trainer.recipes.nano import words
from services.trainer.recipes.nano.codes import Item
from services.trainer.recipes.nano.words import Judged, Prompt, Prompts, advantages, judge, reinforce
from shared.models.recognizer import Recognizer, RecognizerConfig, letters
from tests.services.trainer.conftest import make_row, random_codes

SAID = letters("so it is")


@pytest.fixture
def reader() -> Recognizer:
    torch.manual_seed(3)
    return Recognizer(RecognizerConfig(size=16, num_blocks=1, attention_heads=2, linear_units=24)).eval()


def answer(groups: int, seed: int, *, ended: bool = True) -> Answer:
    return Answer(random_codes(groups, seed), ended)


def prompt(tokenizer, groups: int = 3) -> Prompt:
    return Prompt(np.array(tokenizer.encode_chat(make_row(0).turns()), np.int64), 6, SAID, groups)


def reading(text: str, manner: str = "neutral", groups: int = 2) -> Item:
    said = random_codes(groups, len(text) + len(manner))
    row = {"text": text, "manner": manner, "group": len(text), "voice_name": "af_sky"}
    return {"row": row, "clean_mixed": said, "noisy_mixed": random_codes(groups, 99)}


def test_a_prompt_asks_for_the_letters_of_what_its_answer_says(tokenizer) -> None:
    read = [reading("so it is"), reading("so it is", "emotion/sad", 3), reading("not at all")]
    pool = SimpleNamespace(
        same_voice=lambda _: (read[0], read[2]), same_words=lambda _: read[:2], variant=lambda _: read[2]
    )
    examples = SimpleNamespace(pool=lambda _: pool, tokenizer=tokenizer)
    prompts, rng = Prompts(examples, replace(words.CPU, longest_answer=4)), np.random.default_rng(0)  # type: ignore[arg-type]
    clone, edit, vad, denoise = (kind(rng) for kind in (prompts.clone, prompts.edit, prompts.vad, prompts.denoise))
    assert clone.letters == denoise.letters == letters("not at all")
    assert (edit.letters, edit.groups) == (SAID, 3)
    assert (vad.letters, vad.groups) == (letters("so it is not at all"), 4)
    both = [*read[0]["clean_mixed"], *read[2]["clean_mixed"]]
    assert vad.ids[vad.ids >= tokenizer.audio_offset].tolist() == [id_ + tokenizer.audio_offset for id_ in both]
    assert {len(prompts.draw(rng).letters) for _ in range(40)} == {8, 10, 19}
    read[2]["row"]["text"] = "不是"
    assert {len(prompts.draw(rng).letters) for _ in range(20)} == {8}, (
        "what the recogniser cannot read is not asked for"
    )


def test_letters_are_judged_beside_the_other_answers(reader: Recognizer, tokenizer) -> None:
    group = [answer(3, 0), answer(3, 1), answer(4, 2)]
    heard = judge(reader, prompt(tokenizer), group, torch.device("cpu"))
    assert heard.above.shape == (3, len(SAID))
    is_inside = (np.abs(heard.above) < words.LARGEST).all(0)
    assert is_inside.any()
    assert heard.above[:, is_inside].mean(0) == pytest.approx(0, abs=1e-6)
    assert [len(frames) for frames in heard.frames if frames is not None] == [len(SAID)] * 3
    alone = judge(reader, prompt(tokenizer, groups=4), group, torch.device("cpu"))
    assert heard.scores[2] < alone.scores[2], "an answer as long as the teacher's costs nothing"
    assert (heard.scores[:2] > alone.scores[:2]).all()


def test_an_answer_too_short_for_its_text_says_none_of_it(reader: Recognizer, tokenizer) -> None:
    heard = judge(reader, prompt(tokenizer), [answer(3, 0), answer(1, 1), Answer(np.zeros(0, np.int32), True)],
                  torch.device("cpu"))  # fmt: skip
    assert heard.frames[1] is heard.frames[2] is None
    assert heard.scores[1] <= words.UNSAID
    assert heard.scores.argmax() == 0


def test_tokens_are_owed_the_letters_behind_them_and_a_forced_end_nothing() -> None:
    above = np.zeros((2, 4))
    above[0, 1], above[1, 1] = 1.0, -1.0
    frames = [np.array([0.0, 3.0, 20.0, 25.0])] * 2
    group = [answer(9, 0), answer(9, 1, ended=False)]
    first, second = advantages(Judged(above, frames, above.mean(1)), group, 1.0)
    assert first[5] == first.max() > 0, "the linguistic token at the letter's own frame"
    whole = words.WHOLE * 4**0.5 * above[0].mean()
    assert first[40].item() == pytest.approx(whole, rel=1e-5)
    assert first[45].item() == pytest.approx(whole, rel=1e-5)
    assert second[45] == 0
    torch.testing.assert_close(second[:45], -first[:45])


def test_a_step_makes_the_better_said_answer_likelier(fresh, tokenizer, reader: Recognizer) -> None:
    model, vocabulary = fresh(), Vocabulary(tokenizer.audio_offset, tokenizer.eos)
    asked = prompt(tokenizer)
    group = draw(model, [asked.ids] * 4, [asked.max_groups] * 4, vocabulary, seed=1)
    heard = judge(reader, asked, group, torch.device("cpu"))
    row = branches(asked.ids, [one.mixed for one in group], vocabulary, "cpu")

    def gain() -> float:
        with torch.no_grad():
            log_p, _ = log_probs_after(model, states_before(model, row), row.wanted, row.mask,
                                       torch.full((4,), asked.max_groups), vocabulary, 0.5)  # fmt: skip
        return float((advantages(heard, group, 1.0) * log_p).sum())

    before = gain()
    reinforce(model, [asked], [group], [heard], vocabulary, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad
    assert gain() > before
