"""The decode step."""

from __future__ import annotations

import numpy as np
import pytest

from services.decoder.handler import DecodeHandler
from shared.artifacts import Generated
from shared.audio.io import read_audio
from shared.errors import PermanentError
from shared.schemas import Edit, JobRequest
from tests.services.fakes import FakeInference, FakeStep, tokenized

SOUND = (0.1 * np.sin(np.arange(24_000) / 20)).astype(np.float32)


def step(form: str = "wav") -> FakeStep:
    request = JobRequest.model_validate({"edit": Edit(type="denoise"), "format": form, "seed": 3})
    generated = Generated(tokenized(5).mixed, seed=3, attempts=1, seconds=0.6, collapsed=False, stretch=1.2)
    return FakeStep(request, 2, {"generated": generated.to_bytes(), "tokens": tokenized(8).to_bytes()})


def test_tokens_and_their_reference_become_audio() -> None:
    inference, asked = FakeInference(lambda inputs, parameters: {"audio": SOUND[None]}), step()
    DecodeHandler(inference).run(asked)
    audio = read_audio(asked.written["audio.wav"])
    assert (audio.sample_rate_hz, len(audio.samples)) == (24_000, 24_000)
    [(model, inputs, parameters)] = inference.calls
    assert (model, parameters["steps"], parameters["seed"], parameters["stretch"]) == ("decoder", 10, 3, 1.2)
    assert (len(inputs["mixed"]), len(inputs["prompt_mixed"])) == (25, 40)
    assert inputs["prompt_mel"].shape == (48, 80)


@pytest.mark.parametrize("form", ["flac", "mp3", "opus"])
def test_another_format_is_written_beside_the_wav_that_the_next_iteration_reads(form: str) -> None:
    asked = step(form)
    DecodeHandler(FakeInference(lambda inputs, parameters: {"audio": SOUND})).run(asked)
    assert sorted(asked.written) == sorted(["audio.wav", f"audio.{form}"])
    assert read_audio(asked.written[f"audio.{form}"]).duration_s == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("audio", [np.zeros(0, np.float32), np.full(100, np.nan, np.float32)])
def test_a_decoder_that_makes_no_sound_fails_the_step(audio: np.ndarray) -> None:
    with pytest.raises(PermanentError):
        DecodeHandler(FakeInference(lambda inputs, parameters: {"audio": audio})).run(step())
