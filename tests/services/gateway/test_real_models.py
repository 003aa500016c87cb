"""The same calls with real models of random weights: what comes is noise, and every part of the way is the real one."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile

from shared.audio.io import read_audio
from tests.fixtures.gateways import Served, serving, wav

ROOT = Path(__file__).resolve().parents[3]
SPEECH = ROOT / "tests" / "data" / "audio" / "en_happy_prompt.wav"


@pytest.fixture(scope="module")
def real(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tiny, tmp_path_factory.mktemp("real"), models={}) as found:
        yield found


@pytest.fixture(scope="module")
def speech() -> bytes:
    recording = read_audio(SPEECH)
    buffer = io.BytesIO()
    soundfile.write(buffer, recording.samples[: 2 * recording.sample_rate_hz], recording.sample_rate_hz, format="WAV")
    return buffer.getvalue()


def test_an_edit_goes_through_every_model(real: Served, speech: bytes) -> None:
    fields = {"type": "emotion", "detail": "happy", "text": "You know.", "decode.steps": "2", "seed": "1"}
    with real.client(headers={"prefer": "wait=40"}) as client:
        job = client.post("/v1/audio/edits", data=fields, files={"audio": speech}, timeout=60.0).json()
        assert job["status"] == "done", job
        samples, rate = soundfile.read(io.BytesIO(client.get(job["audio"][0]["href"]).content))
        measured = client.get("/metrics").text
    for model in ("tokenizer", "llm", "decoder"):
        assert f'editx_batch_rows_total{{model="{model}"}}' in measured
    assert 'editx_cache_misses_total{cache="recordings"}' in measured
    assert rate == 24_000
    assert len(samples) / rate == pytest.approx(job["steps"][1]["metrics"]["audio_s"], abs=0.01)


def test_speech_streams_from_the_language_model_through_the_decoder(real: Served, speech: bytes) -> None:
    with real.client(timeout=60.0) as client:
        upload = client.post("/v1/uploads").json()
        client.put(upload["url"], content=speech)
        body = {
            "model": "tiny",
            "input": "Hi.",
            "reference_upload_id": upload["id"],
            "reference_text": "You know.",
            "response_format": "pcm",
            "steps": 2,
            "seed": 1,
        }
        with client.stream("POST", "/v1/audio/speech", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            pieces = list(answer.iter_raw())
        assert len(pieces) > 2
        again = client.post("/v1/audio/speech", json=body).content
    assert b"".join(pieces) == again
    assert len(again) // 2 % 2880 == 0  # whole groups of 120 ms


def test_several_candidates_without_a_reward_model_are_refused(real: Served) -> None:
    with real.client() as client:
        answer = client.post("/v1/audio/edits", data={"type": "denoise", "n_best": "2"}, files={"audio": wav()})
    assert answer.status_code == 400, answer.text
    assert answer.json()["code"] == "no_reward_model"
