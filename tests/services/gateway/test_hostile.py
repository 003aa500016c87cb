"""What should never get through: bad recordings, bad bodies, paths. Each is a problem document, none a 5xx."""

from __future__ import annotations

import base64
import io
import struct
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from tests.fixtures.gateways import Served, serving, wav

DENOISE = {"type": "denoise"}


def header_only(frames: int) -> bytes:
    """A WAV header that promises frames which never come."""
    size = 2 * frames
    form = struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16)
    return b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + form + b"data" + struct.pack("<I", size)


def encoded(samples: np.ndarray, form: str, subtype: str, rate_hz: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format=form, subtype=subtype)
    return buffer.getvalue()


BAD = {
    "nothing": (b"", 400),
    "text": (b"this is no audio" * 100, 415),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(200), 415),
    "a script": (b"#!/bin/sh\nrm -rf /\n", 415),
    "half a header": (wav()[:20], 415),
    "a header alone": (header_only(0), 400),
    "a promise of hours": (header_only(10**8), 400),
    "silence": (wav(1.0, level=0.0), 400),
    "an instant": (wav(0.01), 400),
    "three minutes": (encoded(np.sin(np.arange(180 * 8000) * 0.1), "FLAC", "PCM_16", 8000), 413),
    "no numbers": (encoded(np.full(16_000, np.nan, np.float32), "WAV", "FLOAT"), 400),
    "sixty channels": (encoded(np.random.default_rng(0).uniform(-1, 1, (4000, 60)), "WAV", "PCM_16"), 400),
    "a damaged flac": (encoded(np.sin(np.arange(16_000.0)), "FLAC", "PCM_16")[:3000] + b"\xff" * 500, 415),
    "one hertz": (encoded(np.sin(np.arange(100.0)), "WAV", "PCM_16", 1), 400),
}


@pytest.mark.parametrize("name", BAD)
def test_a_recording_that_cannot_be_used_is_a_problem_that_says_why(client: httpx.Client, name: str) -> None:
    data, status = BAD[name]
    answer = client.post("/v1/audio/edits", data=DENOISE, files={"audio": ("x.wav", data)})
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    assert answer.status_code == status, answer.text
    assert answer.json()["code"].startswith("audio_")
    assert answer.json()["detail"]
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 422),
        (b"null", 422),
        (b"[" * 100_000, 400),
        (b'{"type": "denoise"}', 422),
        (b'{"type": "denoise", "audio": "!!!"}', 422),
        (b'{"type": "denoise", "audio": "eA==", "upload_id": "upl_x"}', 422),
        (b'{"type": "nonsense", "audio": "eA=="}', 422),
        (b'{"type": "denoise", "audio": "eA==", "source_key": "jobs/other/source/audio"}', 422),
        (b'{"type": "emotion", "audio": "eA==", "detail": "happy"}', 415),
        (b'{"type": "denoise", "voice": "../../etc/passwd"}', 404),
        (b'{"type": "denoise", "upload_id": "../../etc/passwd"}', 422),
        (b'{"type": "denoise", "audio": "eA==", "iterations": 1e99}', 422),
        (b'{"type": "denoise", "audio": "\xff\xfe"}', 400),
    ],
)
def test_a_body_that_makes_no_sense_is_a_problem(client: httpx.Client, body: bytes, status: int) -> None:
    answer = client.post("/v1/audio/edits", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"


def test_an_edit_without_the_text_it_needs_names_the_field(client: httpx.Client) -> None:
    values = {"type": "emotion", "detail": "happy", "audio": base64.b64encode(wav()).decode()}
    answer = client.post("/v1/audio/edits", json=values)
    assert answer.status_code == 422
    assert "text" in answer.json()["detail"]


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "multipart/form-data; boundary=", ""])
def test_a_content_type_that_is_not_understood_is_a_415(client: httpx.Client, kind: str) -> None:
    answer = client.post("/v1/audio/edits", content=b"x", headers={"content-type": kind})
    assert answer.status_code in (400, 415)


@pytest.mark.parametrize(
    "path",
    [
        "/studio/../settings.py",
        "/studio/..%2fsettings.py",
        "/studio/%2e%2e/settings.py",
        "/v1/artifacts/../../etc/passwd",
        "/v1/artifacts/..%2f..%2fetc%2fpasswd",
        "/v1/jobs/..%2f..%2fetc/audio",
        "/v1/audio/voices/..%2f..%2f",
        "/v1/batches/..",
    ],
)
def test_no_path_leads_out(client: httpx.Client, path: str) -> None:
    answer = client.send(httpx.Request("GET", str(client.base_url).rstrip("/") + path))
    assert answer.status_code in (400, 403, 404, 405)


def test_bodies_are_cut_off_at_their_limit(tiny: Path, tmp_path: Path) -> None:
    limits: dict[str, Any] = {"max_bytes": 50_000, "max_json_bytes": 200_000, "max_duration_s": 1.5}
    with serving(tiny, tmp_path, **limits) as served, served.client() as client:
        answers = {
            "part": client.post("/v1/audio/edits", data=DENOISE, files={"audio": bytes(60_000)}),
            "base64": client.post("/v1/audio/edits", json={**DENOISE, "audio": "A" * 90_000}),
            "body": client.post("/v1/audio/edits", data=DENOISE, files={"audio": bytes(300_000)}),
            "json": client.post("/v1/batches", json={"edits": [{**DENOISE, "audio": "A" * 300_000}]}),
            "put": client.put(client.post("/v1/uploads").json()["url"], content=bytes(60_000)),
            "duration": client.post("/v1/audio/edits", data=DENOISE, files={"audio": wav(2.0, 8000)}),
            "announced": client.post("/v1/uploads", json={"bytes": 60_000}),
        }
        assert {name: answer.status_code for name, answer in answers.items()} == dict.fromkeys(answers, 413)
        assert client.post("/v1/audio/edits", data=DENOISE, files={"audio": wav(1.0)}).status_code == 202


def test_a_form_with_unknown_or_doubled_parts_is_refused(client: httpx.Client) -> None:
    doubled = [("audio", wav()), ("audio", wav())]
    assert client.post("/v1/audio/edits", data=DENOISE, files=doubled).status_code == 422
    other = {"audio": wav(), "picture": b"x"}
    assert client.post("/v1/audio/edits", data=DENOISE, files=other).status_code == 422
    many = {"audio": wav(), "a": b"x", "b": b"x"}
    assert client.post("/v1/audio/edits", data=DENOISE, files=many).status_code == 400


def test_a_job_that_fails_says_why(served: Served, client: httpx.Client) -> None:
    values = {**DENOISE, "timeout_s": "0.001"}
    job = client.post("/v1/audio/edits", data=values, files={"audio": wav()}, headers={"prefer": "wait=20"}).json()
    assert job["status"] == "failed"
    assert job["error"]["message"]
