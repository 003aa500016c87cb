"""What people do over HTTP, on the whole constellation: clone a stored voice, choose the best of several, cancel, send
batches, hear by webhook."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
from standardwebhooks.webhooks import Webhook

from editx.stack.stack import Stack
from editx_client import Client, JobFailed
from tests.fixtures.receiver import Receiver
from tests.stack.conftest import WEBHOOK_SECRET

SHORT: dict[str, Any] = {"generate": {"max_duration_s": 1.2}, "decode": {"steps": 2}, "seed": 3}
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def recording() -> bytes:
    samples, rate = sf.read(Path(__file__).parents[1] / "data/audio/en_happy_prompt.wav")
    file = io.BytesIO()
    sf.write(file, samples[: 2 * rate], rate, format="FLAC")
    return file.getvalue()


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    with Client(stack.urls["EDITX_PUBLIC_URL"]) as client:
        yield client


def heard(audio: bytes) -> np.ndarray:
    samples: np.ndarray
    samples, rate = sf.read(io.BytesIO(audio))
    assert rate == 24_000
    assert 0.1 < len(samples) / rate <= 1.5
    assert np.isfinite(samples).all()
    return samples


def test_a_stored_voice_is_cloned(client: Client, recording: bytes) -> None:
    voice = client.add_voice("Ada", recording, "you know", consent_statement="I agree.", consent_by="Ada")
    job = client.edit(type="clone", voice="Ada", target_text="Hello.", timeout_s=PATIENCE_S, **SHORT)
    heard(client.audio(job))
    client.remove_voice(voice.id)
    assert "Ada" not in [one.name for one in client.voices()]


def test_the_reward_model_chooses_the_best_of_several(client: Client, recording: bytes) -> None:
    job = client.edit(recording, type="denoise", n_best=3, timeout_s=PATIENCE_S, **SHORT)
    heard(client.audio(job))
    assert [step.kind for step in job.steps] == ["tokenize", "generate", "score", "decode"]
    assert job.steps[2].metrics["candidates"] == 3


def test_a_cancelled_job_ends_as_cancelled(client: Client, recording: bytes) -> None:
    job = client.submit(recording, type="denoise", iterations=5, **SHORT)
    client.cancel(job.id)
    with pytest.raises(JobFailed) as failure:
        client.wait(job.id, timeout_s=PATIENCE_S)
    assert failure.value.job.status == "cancelled"


def test_a_batch_is_done_beside_a_person_who_waits(client: Client, recording: bytes) -> None:
    upload = client.upload(recording)
    edit = {"type": "emotion", "detail": "sad", "text": "you know", "upload_id": upload.id, **SHORT}
    batch = client.submit_batch([edit, {**edit, "detail": "happy"}, {**edit, "seed": 4}])
    alone = client.edit(recording, type="denoise", timeout_s=PATIENCE_S, **SHORT)
    heard(client.audio(alone))
    jobs = [client.wait(job, timeout_s=PATIENCE_S) for job in batch.jobs]
    first, _, other_seed = (heard(client.audio(job)) for job in jobs)
    assert not np.array_equal(first, other_seed)
    assert client.batch(batch.id).status == "done"


def test_the_end_of_a_job_is_told_by_webhook(client: Client, recording: bytes) -> None:
    receiver = Receiver()
    try:
        job = client.edit(recording, type="denoise", webhook_url=receiver.url, timeout_s=PATIENCE_S, **SHORT)
        [(headers, body)] = receiver.wait(1, timeout_s=30.0)
    finally:
        receiver.close()
    told = Webhook(WEBHOOK_SECRET).verify(body, headers)
    assert told["data"]["id"] == job.id
    assert json.loads(body)["type"] == "job.done"
