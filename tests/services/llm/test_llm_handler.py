"""The generate step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from services.llm.handler import GenerateHandler
from services.llm.sampling import length_bounds
from shared.artifacts import Generated
from shared.codes import GROUP, interleave
from shared.errors import PermanentError, UserError
from shared.inference.port import Parameters, Tensors
from shared.prompts import Turn, edit_turns
from shared.schemas import Edit, JobRequest
from tests.services.fakes import FakeInference, FakeStep, tokenized

HAPPY = JobRequest(edit=Edit(type="emotion", detail="happy"), text="Hello.", seed=5)


def encode(turns: object) -> list[int]:
    assert isinstance(turns, list)
    assert all(isinstance(turn, Turn) for turn in turns)
    return [1, 2, 3]


def write(inputs: Tensors, parameters: Parameters) -> Tensors:
    groups = int(parameters["seed"]) % 7 + 1
    mixed = interleave(np.zeros(groups * 2, np.int32), np.ones(groups * 3, np.int32))
    return {"mixed": mixed, "attempts": np.array([2]), "collapsed": np.array([False]), "stretch": np.array([1.25])}


def test_one_candidate_is_written_as_the_result() -> None:
    inference = FakeInference(write)
    step = FakeStep(HAPPY, 1, {"tokens": tokenized().to_bytes()})
    GenerateHandler(inference, encode).run(step)
    assert list(step.written) == ["generated.safetensors"]
    generated = Generated.from_bytes(step.written["generated.safetensors"])
    assert (generated.seed, generated.attempts, generated.collapsed) == (5, 2, False)
    assert generated.stretch == 1.25
    assert generated.seconds == pytest.approx(len(generated.mixed) // GROUP * 0.12 * 1.25)
    [(model, inputs, parameters)] = inference.calls
    assert model == "llm"
    assert inputs["prompt"].tolist() == [1, 2, 3]
    assert "temperature" not in parameters, "the checkpoint says"
    assert (step.metrics["draws"], step.metrics["collapsed"]) == (2, 0)


def test_several_candidates_have_seeds_of_their_own_and_the_first_is_the_one_without() -> None:
    request = HAPPY.model_copy(update={"n_best": 3})
    step = FakeStep(request, 1, {"tokens": tokenized().to_bytes()})
    GenerateHandler(FakeInference(write), encode).run(step)
    assert sorted(step.written) == [f"candidate-{number}.safetensors" for number in range(3)]
    seeds = [Generated.from_bytes(step.written[f"candidate-{number}.safetensors"]).seed for number in range(3)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3


def test_a_model_that_writes_nothing_fails_the_step() -> None:
    nothing = FakeInference(lambda inputs, parameters: {"mixed": np.zeros(0, np.int32)})
    with pytest.raises(PermanentError, match="no audio"):
        GenerateHandler(nothing, encode).run(FakeStep(HAPPY, 1, {"tokens": tokenized().to_bytes()}))


def test_an_unknown_tag_is_the_users_error() -> None:
    request = HAPPY.model_copy(update={"edit": Edit(type="emotion", detail="hapy")})
    with pytest.raises(UserError, match="hapy"):
        GenerateHandler(FakeInference(write), encode).run(FakeStep(request, 1, {"tokens": tokenized().to_bytes()}))


def test_the_bounds_of_the_length_go_to_the_model() -> None:
    model = FakeInference(write)
    GenerateHandler(model, encode).run(FakeStep(HAPPY, 1, {"tokens": tokenized(groups=100).to_bytes()}))
    _, _, parameters = model.calls[0]
    assert (parameters["min_groups"], parameters["max_groups"]) == length_bounds(HAPPY.edit, 100, HAPPY.text)


@pytest.mark.parametrize(("frames", "left"), [(600, [*range(40), *range(80, 100)]), (700, [*range(100)])])
def test_vad_starts_from_the_groups_outside_pauses_where_mel_and_tokens_are_one_span(
    frames: int, left: list[int]
) -> None:
    mel = np.full((frames, 80), -2.0, np.float32)
    mel[240:480] = -11.0  # groups 40 to 79 of a mel that lasts as long as the tokens
    source, seen = replace(tokenized(groups=100), prompt_mel=mel), list[Turn]()
    model = FakeInference(write)

    def remember(turns: Sequence[Turn]) -> list[int]:
        seen.extend(turns)
        return encode(turns)

    GenerateHandler(model, remember).run(FakeStep(JobRequest(edit=Edit(type="vad")), 1, {"tokens": source.to_bytes()}))
    kept = source.mixed.reshape(100, 5)[left].reshape(-1)
    np.testing.assert_array_equal(seen[-1].content[1], kept)
    assert (model.calls[0][2]["max_groups"], model.calls[0][2]["ends_full"]) == (len(left), 1)


@pytest.mark.parametrize(
    ("edit", "text", "said"),
    [
        (Edit(type="emotion", detail="happy"), "Well.", "Well."),
        (Edit(type="clone", target_text="So."), "Well.", "So."),
        (Edit(type="denoise"), None, None),
        (Edit(type="denoise"), "Well.", "Well."),
    ],
)
def test_the_model_is_told_what_the_answer_should_say(edit: Edit, text: str | None, said: str | None) -> None:
    model = FakeInference(write)
    step = FakeStep(JobRequest(edit=edit, text=text), 1, {"tokens": tokenized().to_bytes()})
    GenerateHandler(model, encode).run(step)
    _, inputs, _ = model.calls[0]
    told = "".join(map(chr, inputs["text"])) if "text" in inputs else None
    assert told == said
    assert ("manner" in inputs) == (edit.type == "emotion")
    assert ("spoken" in inputs) == (said is None or "manner" in inputs)
    if "spoken" in inputs:
        np.testing.assert_array_equal(inputs["spoken"], tokenized().mixed)
    if "manner" in inputs:
        assert "".join(map(chr, inputs["manner"])) == "emotion/happy"


@pytest.mark.parametrize(("longest_s", "stretch"), [(None, 1.25), (0.8, 0.8 / 0.72), (0.5, 1.0)])
def test_a_result_is_not_stretched_beyond_the_longest_that_is_allowed(longest_s: float | None, stretch: float) -> None:
    request = HAPPY.model_copy(update={"generate": HAPPY.generate.model_copy(update={"max_duration_s": longest_s})})
    step = FakeStep(request, 1, {"tokens": tokenized().to_bytes()})
    GenerateHandler(FakeInference(write), encode).run(step)
    assert Generated.from_bytes(step.written["generated.safetensors"]).stretch == pytest.approx(stretch)


@pytest.mark.parametrize(
    ("edit", "is_guided"),
    [
        (Edit(type="emotion", detail="happy"), True),
        (Edit(type="speed", detail="faster"), True),
        (Edit(type="style", detail="remove"), False),
        (Edit(type="clone", target_text="So."), False),
        (Edit(type="denoise"), False),
    ],
)
def test_an_edit_of_the_manner_is_told_what_it_should_not_end_up_as(edit: Edit, is_guided: bool) -> None:
    model, seen = FakeInference(write), list[Sequence[Turn]]()

    def remember(turns: Sequence[Turn]) -> list[int]:
        seen.append(turns)
        return encode(turns)

    step = FakeStep(JobRequest(edit=edit, text="Well."), 1, {"tokens": tokenized().to_bytes()})
    GenerateHandler(model, remember).run(step)
    assert ("against" in model.calls[0][1]) == is_guided == (len(seen) == 2)
    if is_guided:
        plain = edit_turns(Edit(type="emotion", detail="remove"), "Well.", tokenized().mixed)
        assert seen[1][-1].content[0] == plain[-1].content[0]
