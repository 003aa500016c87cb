"""The served unit: each request is answered for itself, streams add up, parameters are checked, threads share it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from services.llm.model import LlmModel, sampling_settings
from services.llm.settings import LlmSettings
from shared.checkpoints import Checkpoint
from shared.checkpoints.step1 import load_text_tokenizer
from shared.codes import split
from shared.errors import MissingComponent, UserError
from shared.inference.port import InferenceRequest, StreamingModel
from shared.prompts import edit_turns
from shared.schemas.edit import Edit

SETTINGS = LlmSettings(slots=4, context=1024, dtype="float32", stream_groups=2)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Iterator[LlmModel]:
    made = LlmModel(checkpoint, settings=SETTINGS)
    yield made
    made.close()


def request(checkpoint: Checkpoint, detail: str = "happy", **parameters: float) -> InferenceRequest:
    turns = edit_turns(Edit(type="emotion", detail=detail), "Good day.", [1, 2, 1024, 1025, 1026] * 6)
    prompt = np.array(load_text_tokenizer(checkpoint).encode_chat(turns), dtype=np.int64)
    return InferenceRequest({"prompt": prompt}, {"max_groups": 8, "min_groups": 2, **parameters})


def test_it_is_a_streaming_model_named_llm(model: LlmModel) -> None:
    assert isinstance(model, StreamingModel)
    assert model.name == "llm"


def test_a_batch_answers_each_request_and_one_bad_request_alone(model: LlmModel, checkpoint: Checkpoint) -> None:
    bad = InferenceRequest({"prompt": np.zeros(0, dtype=np.int64)})
    answers = model.infer([request(checkpoint, seed=1), bad, request(checkpoint, "sad", seed=2, temperature="x")])  # type: ignore[arg-type]
    first = answers[0]
    assert not isinstance(first, Exception)
    split(first["mixed"])
    assert first["mixed"].dtype == np.int32
    assert int(first["attempts"]) == 3
    assert bool(first["collapsed"]) is True
    assert [type(answer) for answer in answers[1:]] == [UserError, UserError]


def test_the_same_request_gives_the_same_tokens_and_another_seed_others(
    model: LlmModel, checkpoint: Checkpoint
) -> None:
    same, again, other = model.infer([request(checkpoint, seed=s) for s in (4, 4, 5)])
    np.testing.assert_array_equal(same["mixed"], again["mixed"])  # type: ignore[index]
    assert not np.array_equal(same["mixed"], other["mixed"])  # type: ignore[index]


def test_a_stream_adds_up_to_the_unary_answer_of_its_first_attempt(model: LlmModel, checkpoint: Checkpoint) -> None:
    asked = request(checkpoint, seed=7, attempts=1)
    whole = model.infer([asked])[0]
    pieces = list(model.stream(asked))
    np.testing.assert_array_equal(np.concatenate([piece["mixed"] for piece in pieces]), whole["mixed"])  # type: ignore[index]
    assert all(len(piece["mixed"]) % 5 == 0 for piece in pieces)
    assert [bool(piece["collapsed"]) for piece in pieces[:-1]] == [False] * (len(pieces) - 1)
    assert bool(pieces[-1]["collapsed"]) is True


def test_many_threads_may_call_at_once(model: LlmModel, checkpoint: Checkpoint) -> None:
    expected = [model.infer([request(checkpoint, seed=s)])[0]["mixed"] for s in range(6)]  # type: ignore[index]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda s: model.infer([request(checkpoint, seed=s)])[0]["mixed"], range(6)))  # type: ignore[index]
    for left, right in zip(expected, found, strict=True):
        np.testing.assert_array_equal(left, right)


def test_parameters_of_other_models_are_ignored_and_wrong_ones_named() -> None:
    settings = sampling_settings({"temperature": "0.5", "seed": 3, "steps": 10})
    assert (settings.temperature, settings.seed, settings.top_p) == (0.5, 3, 1.0)
    with pytest.raises(UserError, match="top_p must lie"):
        sampling_settings({"top_p": 7})


def test_settings_come_from_the_environment_and_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDITX_LLM_SLOTS", "3")
    assert LlmSettings().slots == 3
    with pytest.raises(ValidationError):
        LlmSettings(slots=0)


def test_a_wrong_setting_is_the_operator_s_error(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDITX_LLM_QUANTIZE", "int4")
    with pytest.raises(UserError, match="EDITX_LLM_QUANTIZE is 'int4'"):
        LlmModel(checkpoint)


def test_float16_weights_are_for_cpus_that_compute_in_float32(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match="EDITX_LLM_QUANTIZE=half is for x86 CPUs"):
        LlmModel(checkpoint, settings=LlmSettings(quantize="half", dtype="bfloat16"))
    for quantize in ("auto", "half", "none"):
        model = LlmModel(checkpoint, settings=LlmSettings(slots=2, context=1024, dtype="float32", quantize=quantize))  # type: ignore[arg-type]
        [answer] = model.infer([request(checkpoint)])
        model.close()
        assert not isinstance(answer, Exception)
        assert len(answer["mixed"]) >= 10


def test_a_checkpoint_without_a_language_model_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(MissingComponent, match=r"config\.json"):
        LlmModel(Checkpoint.resolve(tmp_path))
