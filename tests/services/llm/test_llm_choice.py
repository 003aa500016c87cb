"""Several answers and the choice among them by their words and their manner."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from services.llm.choice import LONGEST_STRETCH, MANNER_COST, AskedManner, Choice, Chosen, seeds
from services.llm.model import LlmModel
from services.llm.requests import Collapse, Outcome
from services.llm.settings import LlmSettings
from shared.checkpoints import Checkpoint
from shared.checkpoints.layout import RECOGNIZER_FILE
from shared.checkpoints.recognizer import save_recognizer
from shared.codes import interleave, time_align
from shared.errors import UserError
from shared.inference.port import InferenceRequest, Tensors
from shared.models.recognizer import Recognizer, RecognizerConfig, letters
from shared.prosody import AIMS, SCALES, Prosody
from shared.schemas.request import SEED_MAX

TEXT = "so it was"
CONFIG = RecognizerConfig(size=32, num_blocks=1, attention_heads=2, linear_units=48)


@pytest.fixture(scope="module")
def recognizer() -> Recognizer:
    torch.manual_seed(3)
    return Recognizer(CONFIG).eval()


@pytest.fixture(scope="module")
def reading(checkpoint: Checkpoint, recognizer: Recognizer, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny checkpoint with a recogniser and four candidates."""
    folder: Path = tmp_path_factory.mktemp("reading") / "tiny"
    shutil.copytree(checkpoint.root, folder)
    save_recognizer(recognizer, folder / RECOGNIZER_FILE, dtype=torch.float32)
    (folder / "editx.json").write_text('{"name": "tiny", "candidates": 4}')
    return Checkpoint.resolve(folder)


@pytest.fixture(scope="module")
def model(reading: Checkpoint) -> Iterator[LlmModel]:
    made = LlmModel(reading, settings=LlmSettings(slots=4, context=1024, dtype="float32"))
    yield made
    made.close()


def codes(groups: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return interleave(rng.integers(0, 1024, groups * 2), rng.integers(0, 4096, groups * 3)).astype(np.int32)


def outcome(seed: int, collapse: Collapse | None = None) -> Outcome:
    return Outcome(codes(8, seed), 1, collapse)


def asked(seed: int, text: str | None = None, **parameters: int) -> InferenceRequest:
    inputs: Tensors = {"prompt": np.arange(5, 25, dtype=np.int64)}
    if text is not None:
        inputs["text"] = np.array([ord(character) for character in text], np.int32)
    return InferenceRequest(inputs, {"seed": seed, "min_groups": 4, "max_groups": 8, "attempts": 1, **parameters})


def answered(model: LlmModel, request: InferenceRequest) -> Tensors:
    [answer] = model.infer([request])
    assert isinstance(answer, dict)
    return answer


def unasked() -> Prosody:
    raise AssertionError("no manner is asked for")


def loss(recognizer: Recognizer, mixed: np.ndarray) -> float:
    pairs = time_align(torch.from_numpy(mixed).long())[None]
    with torch.inference_mode():
        return float(recognizer.loss(pairs, torch.tensor([pairs.shape[1]]), [letters(TEXT)]))


def test_the_first_seed_is_the_requests_own_and_all_are_in_range() -> None:
    found = seeds(SEED_MAX - 1, 8)
    assert found[0] == SEED_MAX - 1
    assert len(set(found)) == 8
    assert all(0 <= seed <= SEED_MAX for seed in found)


def test_the_likeliest_answer_is_kept(recognizer: Recognizer) -> None:
    outcomes = [outcome(seed) for seed in range(5)]
    best, stretch = Choice(recognizer, 5, unasked).best(outcomes, TEXT)
    assert stretch == 1
    assert loss(recognizer, best.mixed) == min(loss(recognizer, one.mixed) for one in outcomes)


def test_a_manner_counts_beside_the_words(recognizer: Recognizer) -> None:
    outcomes = [outcome(seed) for seed in range(3)]
    losses = np.array([loss(recognizer, one.mixed) for one in outcomes])
    source, change = np.array([5.0, 2.0, 4.0, -6.0, 0.7]), SCALES / AIMS
    measures = np.stack([source, source, source, source])
    worst = int(losses.argmax())
    measures[1 + worst] += SCALES
    made: list[int] = []

    def prosody() -> Prosody:
        made.append(1)
        return lambda answers: measures[: len(answers)]  # type: ignore[return-value]

    choice = Choice(recognizer, 3, prosody)
    asked_for = AskedManner(codes(9, 20), change)
    assert np.ptp(losses) < MANNER_COST, "else the words decide here"
    assert [choice.best(outcomes, TEXT, asked_for).outcome for _ in range(2)] == [outcomes[worst]] * 2
    assert made == [1], "what measures is made once, when it is needed"
    best = outcomes[int(losses.argmin())]
    assert choice.best(outcomes, TEXT, replace(asked_for, source=codes(0, 20))) == (best, 1.0)


def test_what_is_missing_of_a_manners_pace_is_told(recognizer: Recognizer) -> None:
    said = np.array([[5.0, 2.0, 4.0, -6.0, 0.7], [5.0, 2.0, 4.1, -6.0, 0.7]])
    choice = Choice(recognizer, 1, lambda: lambda _: said)  # type: ignore[arg-type,return-value]
    for change, factor in ((0.2, np.exp(0.1)), (-0.1, np.exp(-0.2)), (1.0, np.exp(LONGEST_STRETCH))):
        asked_for = AskedManner(codes(9, 20), np.array([0.0, 0.0, change, 0.0, 0.0]))
        assert choice.best([outcome(1)], TEXT, asked_for).stretch == pytest.approx(factor)


def test_the_checkpoint_says_which_manners_are_measured(
    reading: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "measured"
    shutil.copytree(reading.root, folder)
    (folder / "editx.json").write_text(
        json.dumps({"name": "tiny", "candidates": 2, "manners": {"emotion/sad": [1.0] * 5}})
    )
    seen: list[AskedManner | None] = []
    monkeypatch.setattr(Choice, "best", lambda _, outcomes, __, manner: seen.append(manner) or Chosen(outcomes[0], 1.5))
    model = LlmModel(Checkpoint.resolve(folder), settings=LlmSettings(slots=4, context=1024, dtype="float32"))
    spoken = codes(12, 5)
    for manner, source in (("emotion/sad", spoken), ("emotion/happy", spoken), ("emotion/sad", None)):
        request = asked(7, TEXT)
        inputs = request.inputs | {"manner": np.array([ord(character) for character in manner], np.int32)}
        answer = answered(model, replace(request, inputs=inputs if source is None else inputs | {"spoken": source}))
        assert float(answer["stretch"]) == 1.5
    model.close()
    assert [one is not None for one in seen] == [True, False, False]
    assert seen[0] is not None
    np.testing.assert_array_equal(seen[0].source, spoken)
    np.testing.assert_array_equal(seen[0].change, np.ones(5))


def test_an_answer_that_collapsed_is_kept_only_where_all_did(recognizer: Recognizer) -> None:
    choice = Choice(recognizer, 3, unasked)
    sound = outcome(1)
    assert choice.best([outcome(0, "loop"), sound, outcome(2, "no_end")], TEXT).outcome is sound
    assert choice.best([outcome(0, "loop"), outcome(2, "loop")], TEXT).outcome.collapse == "loop"


def test_the_model_draws_as_many_as_the_checkpoint_says_and_gives_the_best(
    model: LlmModel, recognizer: Recognizer
) -> None:
    drawn = [answered(model, asked(seed))["mixed"] for seed in seeds(7, 4)]
    losses = [loss(recognizer, mixed) for mixed in drawn]
    np.testing.assert_array_equal(answered(model, asked(7, TEXT))["mixed"], drawn[int(np.argmin(losses))])


def test_where_no_text_is_told_the_best_says_what_the_recording_says(model: LlmModel, recognizer: Recognizer) -> None:
    spoken = codes(12, 5)
    text = Choice(recognizer, 4, unasked).read(spoken)
    assert letters(text)
    request = replace(asked(7), inputs={**asked(7).inputs, "spoken": spoken})
    np.testing.assert_array_equal(answered(model, request)["mixed"], answered(model, asked(7, text))["mixed"])
    told = replace(asked(7, TEXT), inputs={**asked(7, TEXT).inputs, "spoken": spoken})
    np.testing.assert_array_equal(answered(model, told)["mixed"], answered(model, asked(7, TEXT))["mixed"])


def test_a_recording_of_nothing_is_answered_once_and_a_wrong_one_refused(model: LlmModel) -> None:
    empty = replace(asked(7), inputs={**asked(7).inputs, "spoken": np.zeros(0, np.int32)})
    np.testing.assert_array_equal(answered(model, empty)["mixed"], answered(model, asked(7))["mixed"])
    wrong = replace(asked(7), inputs={**asked(7).inputs, "spoken": np.zeros(5, np.int32)})
    [refused] = model.infer([wrong])
    assert isinstance(refused, UserError)


def test_guided_answers_count_as_two(model: LlmModel, recognizer: Recognizer) -> None:
    def guided(seed: int, text: str | None = None) -> InferenceRequest:
        request = asked(seed, text, guidance=2)
        return replace(request, inputs={**request.inputs, "against": np.arange(30, 60, dtype=np.int64)})

    drawn = [answered(model, guided(seed))["mixed"] for seed in seeds(7, 2)]
    losses = [loss(recognizer, mixed) for mixed in drawn]
    np.testing.assert_array_equal(answered(model, guided(7, TEXT))["mixed"], drawn[int(np.argmin(losses))])
    assert tuple(drawn[0]) != tuple(answered(model, asked(7))["mixed"])
    without = asked(7, guidance=2)
    np.testing.assert_array_equal(answered(model, without)["mixed"], answered(model, asked(7))["mixed"])


def test_guidance_is_the_checkpoints_or_the_operators(reading: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "guided"
    shutil.copytree(reading.root, folder)
    (folder / "editx.json").write_text('{"name": "tiny", "guidance": 2}')
    request = asked(7)
    away = replace(request, inputs={**request.inputs, "against": np.arange(30, 60, dtype=np.int64)})
    found = {}
    for name, settings in {"theirs": {}, "none": {"guidance": 0.0}, "one slot": {"slots": 1}}.items():
        chosen = LlmSettings(**{"slots": 4, "context": 1024, "dtype": "float32", **settings})  # type: ignore[arg-type]
        model = LlmModel(Checkpoint.resolve(folder), settings=chosen)
        found[name] = tuple(answered(model, away)["mixed"])
        [forced] = model.infer([replace(away, parameters={**away.parameters, "guidance": 2})])
        assert isinstance(forced, UserError) == (name == "one slot")
        model.close()
    assert found["theirs"] != found["none"] == found["one slot"]


@pytest.mark.parametrize("text", [None, "", "他说", "1984"])
def test_a_text_that_cannot_be_read_is_answered_once(model: LlmModel, text: str | None) -> None:
    np.testing.assert_array_equal(answered(model, asked(7, text))["mixed"], answered(model, asked(7))["mixed"])


def test_the_operator_may_ask_for_one(reading: Checkpoint, model: LlmModel) -> None:
    single = LlmModel(reading, settings=LlmSettings(slots=4, context=1024, dtype="float32", candidates=1))
    try:
        expected = answered(model, asked(7))["mixed"]
        np.testing.assert_array_equal(answered(single, asked(7, TEXT))["mixed"], expected)
    finally:
        single.close()


def test_a_request_that_cannot_be_drawn_fails_alone_and_leaves_nothing_running(model: LlmModel) -> None:
    refused, fine = model.infer([asked(1, TEXT, min_groups=9, max_groups=8), asked(2, TEXT)])
    assert isinstance(refused, UserError)
    assert isinstance(fine, dict)
    assert model.engine.load == (0, 0)


def test_a_text_that_is_none_is_refused(model: LlmModel) -> None:
    request = asked(1)
    request.inputs["text"] = np.array([-1], np.int32)
    [refused] = model.infer([request])
    assert isinstance(refused, UserError)


def test_a_stream_draws_once(model: LlmModel) -> None:
    pieces = [piece["mixed"] for piece in model.stream(asked(7, TEXT))]
    np.testing.assert_array_equal(np.concatenate(pieces), answered(model, asked(7))["mixed"])
