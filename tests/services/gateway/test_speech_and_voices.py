"""Stored voices with consent, and speech that streams in OpenAI's shape."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from services.gateway import encoding
from tests.fixtures.gateways import Served, events, serving, wav

CONSENT = {"consent_statement": "I speak here and I agree.", "consent_by": "Ada"}
SAID = {"model": "tiny", "input": "Good morning [Laughter] everybody.", "seed": 1}
REFERRING = {
    **SAID,
    "reference_audio": base64.b64encode(wav()).decode(),
    "reference_text": "What it says.",
    "response_format": "pcm",
}


def store(client: httpx.Client, name: str, **values: str) -> httpx.Response:
    fields = {"name": name, "text": "What she says.", **CONSENT, **values}
    return client.post("/v1/audio/voices", data=fields, files={"audio": ("ada.wav", wav(2.0))})


@pytest.fixture
def voice(client: httpx.Client) -> Iterator[dict[str, Any]]:
    made = store(client, "Ada").json()
    yield made
    client.delete(f"/v1/audio/voices/{made['id']}")


def test_a_voice_is_kept_with_the_attestation_of_consent(
    served: Served, client: httpx.Client, voice: dict[str, Any]
) -> None:
    assert voice["object"] == "audio.voice"
    assert voice["consent"] | {"given_at": 0} == {
        "kind": "attestation", "statement": CONSENT["consent_statement"], "by": "Ada", "given_at": 0, "sha256": "",
    }  # fmt: skip
    assert client.get("/v1/audio/voices").json()["data"] == [voice]
    assert client.get("/v1/audio/voices/Ada").json() == client.get(f"/v1/audio/voices/{voice['id']}").json() == voice


def test_a_voice_may_come_with_a_recording_of_consent(served: Served, client: httpx.Client) -> None:
    files = {"audio": ("a.wav", wav(2.0)), "consent_recording": ("c.wav", wav(1.0))}
    made = client.post("/v1/audio/voices", data={"name": "Bob", "text": "Words."}, files=files).json()
    assert made["consent"]["kind"] == "recording"
    assert served.system.store.get(f"voices/local/{made['id']}/consent") == wav(1.0)
    assert client.delete(f"/v1/audio/voices/{made['id']}").status_code == 204
    assert not list(served.system.store.list(f"voices/local/{made['id']}/"))


def test_a_voice_without_consent_is_refused(client: httpx.Client) -> None:
    answer = store(client, "Eve", consent_by="")
    assert answer.status_code == 422
    assert "consent" in answer.json()["detail"]


def test_a_name_is_one_voice_s_only(client: httpx.Client, voice: dict[str, Any]) -> None:
    answer = store(client, "Ada")
    assert (answer.status_code, answer.json()["code"]) == (409, "voice_exists")


def test_a_silent_reference_is_refused(client: httpx.Client) -> None:
    fields = {"name": "Nobody", "text": "Nothing.", **CONSENT}
    answer = client.post("/v1/audio/voices", data=fields, files={"audio": ("s.wav", wav(1.0, level=0.0))})
    assert (answer.status_code, answer.json()["code"]) == (400, "audio_silent")


def test_a_voice_can_be_cloned_without_saying_its_text_again(client: httpx.Client, voice: dict[str, Any]) -> None:
    body = {"type": "clone", "target_text": "New words.", "voice": "Ada"}
    job = client.post("/v1/audio/edits", json=body, headers={"prefer": "wait=20"}).json()
    assert (job["status"], job["text"]) == ("done", "What she says.")


@pytest.mark.parametrize("form", ["wav", "mp3", "opus", "flac", "pcm"])
def test_speech_comes_in_every_format(client: httpx.Client, voice: dict[str, Any], form: str) -> None:
    answer = client.post("/v1/audio/speech", json={**SAID, "voice": voice["id"], "response_format": form})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == encoding.CONTENT_TYPES[form]
    if form == "pcm":
        assert len(answer.content) == 2 * 28_800
        return
    samples, rate = soundfile.read(io.BytesIO(answer.content))
    assert rate == 24_000 or form == "opus"
    assert len(samples) / rate == pytest.approx(1.2, abs=0.12)


def test_the_first_audio_comes_before_generation_ends(
    served: Served, client: httpx.Client, voice: dict[str, Any]
) -> None:
    served.llm.gate.clear()
    done = served.llm.finished_streams
    try:
        body = {**SAID, "voice": {"id": voice["id"]}, "response_format": "pcm"}
        with client.stream("POST", "/v1/audio/speech", json=body) as answer:
            chunks = answer.iter_raw()
            first = next(chunks)
            assert first
            assert served.llm.finished_streams == done
            served.llm.gate.set()
            rest = b"".join(chunks)
    finally:
        served.llm.gate.set()
    assert len(first) + len(rest) == 2 * 28_800
    assert served.llm.finished_streams == done + 1


def test_leaving_a_stream_stops_the_model_and_gives_the_place_back(tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, tmp_path, speech_max=1) as served:
        served.llm.gate.clear()
        with served.client() as client, client.stream("POST", "/v1/audio/speech", json=REFERRING) as answer:
            chunks = answer.iter_raw()
            assert next(chunks)
            assert served.gateway.speaking.locked()
            assert served.llm.held.wait(10)
        until = time.monotonic() + 10
        while served.gateway.speaking.locked() and time.monotonic() < until:
            time.sleep(0.02)
        assert not served.gateway.speaking.locked()
        assert served.llm.cancelled == 1


def test_more_speech_than_there_are_places_is_refused(tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, tmp_path, speech_max=1) as served, served.client() as client, served.client() as other:
        served.llm.gate.clear()
        with client.stream("POST", "/v1/audio/speech", json=REFERRING) as answer:
            chunks = answer.iter_raw()
            assert next(chunks)
            refused = other.post("/v1/audio/speech", json=REFERRING)
            served.llm.gate.set()
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")


def test_speech_as_events_carries_the_same_audio(client: httpx.Client, voice: dict[str, Any]) -> None:
    body = {**SAID, "voice": voice["id"], "response_format": "pcm"}
    whole = client.post("/v1/audio/speech", json=body).content
    told = events(client.post("/v1/audio/speech", json={**body, "stream_format": "sse"}).text)
    assert {event for _, event, _ in told[:-1]} == {"speech.audio.delta"}
    assert b"".join(base64.b64decode(json.loads(data)["audio"]) for _, _, data in told[:-1]) == whole
    assert json.loads(told[-1][2]) == {"type": "speech.audio.done", "usage": {"audio_seconds": 1.2}}


def test_speech_takes_a_reference_instead_of_a_voice(client: httpx.Client) -> None:
    assert client.post("/v1/audio/speech", json=REFERRING).status_code == 200
    upload = client.post("/v1/uploads").json()
    httpx.put(upload["url"], content=wav())
    body = {**SAID, "reference_upload_id": upload["id"], "reference_text": "What it says."}
    assert client.post("/v1/audio/speech", json=body).status_code == 200


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"model": "gpt-4o-mini-tts"}, 404, "model_not_found"),
        ({"voice": "alloy"}, 404, "voice_not_found"),
        ({"instructions": "Speak like a pirate."}, 400, "unsupported_parameter"),
        ({"speed": 2.0}, 400, "unsupported_parameter"),
        ({"response_format": "aac"}, 400, "unknown_format"),
        ({"input": "  "}, 422, "invalid_request"),
        ({"input": "Hello [Laufter]"}, 400, "unknown_tag"),
        ({"reference_audio": "eA=="}, 422, "invalid_request"),
    ],
)
def test_what_speech_cannot_do_is_said(
    client: httpx.Client, voice: dict[str, Any], change: dict[str, Any], status: int, code: str
) -> None:
    answer = client.post("/v1/audio/speech", json={**SAID, "voice": voice["id"], **change})
    assert (answer.status_code, answer.json()["code"]) == (status, code)


@pytest.mark.parametrize("form", ["mp3", "opus"])
def test_an_encoder_gives_bytes_before_the_end(form: str) -> None:
    encoder = encoding.encoder(form, 24_000)
    noise = (0.1 * np.random.default_rng(0).standard_normal(24_000)).astype(np.float32)
    early = b"".join(encoder.push(noise) for _ in range(3))
    samples, _ = soundfile.read(io.BytesIO(early + encoder.finish()))
    assert len(early) > 2000
    assert samples.std() == pytest.approx(0.1, abs=0.03)
