"""The tokenize step."""

from pathlib import Path

import numpy as np
import pytest

from services.tokenizer.handler import TokenizeHandler
from shared.artifacts import Tokenized
from shared.errors import UserError
from shared.schemas import Edit, JobRequest
from tests.services.fakes import FakeInference, FakeStep, tokenized

AUDIO = Path("tests/data/audio/en_happy_prompt.wav")


def test_a_recording_becomes_a_tokenized_artifact() -> None:
    codes = tokenized()
    inference = FakeInference(lambda inputs, parameters: {
        "linguistic": codes.linguistic.astype(np.int64),
        "semantic": codes.semantic,
        "speaker_embedding": codes.speaker_embedding,
        "prompt_mel": codes.prompt_mel,
    })  # fmt: skip
    request = JobRequest(edit=Edit(type="denoise"), trim_before_mel=True)
    step = FakeStep(request, 0, {"audio": AUDIO.read_bytes()})
    TokenizeHandler(inference).run(step)
    found = Tokenized.from_bytes(step.written["tokens.safetensors"])
    np.testing.assert_array_equal(found.mixed, codes.mixed)
    [(model, inputs, parameters)] = inference.calls
    assert (model, parameters["trim_before_mel"]) == ("tokenizer", True)
    assert found.duration_s == pytest.approx(len(inputs["audio"]) / float(parameters["sample_rate_hz"]))
    assert step.metrics["audio_s"] == found.duration_s


def test_something_that_is_no_audio_is_the_users_error() -> None:
    step = FakeStep(JobRequest(edit=Edit(type="denoise")), 0, {"audio": b"these are words, not sound"})
    with pytest.raises(UserError):
        TokenizeHandler(FakeInference(lambda inputs, parameters: {})).run(step)
    assert step.written == {}
