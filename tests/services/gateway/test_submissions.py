"""Edits that are submitted over the bus are as good as those that come over HTTP."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook

from shared.bus.port import Subscription
from shared.intake import Intake
from shared.schemas.exchange import RESULTS, SUBMISSIONS, Result
from tests.fixtures.gateways import Served, events, serving, wav
from tests.fixtures.receiver import Receiver

SECRET = "whsec_" + base64.b64encode(b"a secret of thirty-two bytes....").decode()
PATIENCE_S = 20.0


@dataclass
class Sender:
    """A system of somebody else that writes submissions and reads results."""

    served: Served
    reader: Subscription
    results: list[Result] = field(default_factory=list)

    def submit(self, name: str, audio: bytes | None = None, **changes: Any) -> None:
        document = {"submission_id": name, "request": {"edit": {"type": "denoise"}}, **changes}
        if audio is not None:
            document["audio"] = base64.b64encode(audio).decode()
        self.served.system.bus.publish(SUBMISSIONS, name, json.dumps(document).encode())

    def told(self, name: str, *states: str) -> Result:
        """The first result of a submission, of some states if given."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            for result in self.results:
                if result.submission_id == name and (not states or result.state in states):
                    return result
            deliveries = self.reader.poll(0.1, max_records=100)
            self.results += [Result.model_validate_json(record.value) for record in deliveries]
            if deliveries:
                self.reader.commit({record.partition: record.offset + 1 for record in deliveries})
        raise AssertionError(f"nothing was told of {name}: {self.results}")


@pytest.fixture(scope="module")
def sender(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sender]:
    settings = {"webhook_secret": SECRET, "webhook_allowed_hosts": ("127.0.0.1",)}
    with serving(tiny, tmp_path_factory.mktemp("submitted"), **settings) as served:
        system = served.system
        intake = Intake(system.bus, system.store, system.jobs, keep_s=3600.0, poll_s=0.05)
        thread = threading.Thread(target=intake.run)
        thread.start()
        yield Sender(served, system.bus.subscribe([RESULTS], "sender"))
        intake.stop()
        thread.join(timeout=10)


def test_its_progress_is_followed_and_its_audio_fetched_over_http(sender: Sender) -> None:
    sender.submit("followed", wav())
    accepted = sender.told("followed")
    assert accepted.state == "accepted"
    with sender.served.client() as client:
        stream = events(client.get(f"/v1/jobs/{accepted.job_id}/events").text)
        assert [stream[0][1], stream[-1][1]] == ["job.accepted", "job.done"]
        assert "job.step" in [event for _, event, _ in stream]
        assert client.get(f"/v1/jobs/{accepted.job_id}/audio").content[:4] == b"RIFF"
        assert client.get(f"/v1/jobs/{accepted.job_id}/audio?iteration=0").content == wav()
        listed = [job["id"] for job in client.get("/v1/jobs").json()["data"]]
    assert accepted.job_id in listed
    assert sender.told("followed", "done").job_id == accepted.job_id


def test_a_recording_that_lies_in_the_store_is_the_source_of_its_job(sender: Sender) -> None:
    sender.served.system.store.put("recordings/one", wav())
    sender.submit("stored", request={"edit": {"type": "denoise"}, "source_key": "recordings/one"})
    job_id = sender.told("stored", "done").job_id
    with sender.served.client() as client:
        assert client.get(f"/v1/jobs/{job_id}/audio?iteration=0").content == wav()


def test_its_webhook_is_sent(sender: Sender) -> None:
    receiver = Receiver()
    sender.submit("hooked", wav(), request={"edit": {"type": "denoise"}, "webhook_url": receiver.url})
    headers, body = receiver.wait(1)[0]
    told = Webhook(SECRET).verify(body, headers)
    assert told["data"]["id"] == sender.told("hooked").job_id
    until = time.monotonic() + PATIENCE_S
    while list(sender.served.system.store.list("webhooks/")):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert len(receiver.posts) == 1
    receiver.close()


def test_it_names_voices_and_uploads_that_came_over_http(sender: Sender) -> None:
    with sender.served.client() as client:
        said = {"name": "Ada", "text": "What she says.", "consent_statement": "I agree.", "consent_by": "Ada"}
        assert client.post("/v1/audio/voices", data=said, files={"audio": wav(3.0)}).status_code == 201
        upload = client.post("/v1/uploads", json={}).json()
        assert client.put(upload["url"], content=wav()).is_success
    sender.submit("voiced", voice="Ada", request={"edit": {"type": "clone", "target_text": "Hello there."}})
    sender.submit("uploaded", upload_id=upload["id"])
    assert [sender.told(name, "done", "failed").state for name in ("voiced", "uploaded")] == ["done", "done"]


def test_it_is_cancelled_over_http(sender: Sender) -> None:
    sender.submit("cancelled", wav(), request={"edit": {"type": "denoise"}, "iterations": 10})
    job_id = sender.told("cancelled").job_id
    with sender.served.client() as client:
        assert client.post(f"/v1/jobs/{job_id}/cancel").status_code in (200, 202, 409)
    assert sender.told("cancelled", "cancelled", "done").job_id == job_id


@pytest.mark.parametrize(
    ("name", "audio"),
    [
        ("nothing", b""),
        ("noise", bytes(range(256)) * 40),
        ("cut", wav()[:60]),
        ("silence", wav(level=0.0)),
        ("long-header", b"RIFF\xff\xff\xff\xffWAVEfmt " + bytes(100)),
    ],
)
def test_a_recording_that_cannot_be_used_ends_with_a_reason_and_holds_nobody_up(
    sender: Sender, name: str, audio: bytes
) -> None:
    sender.submit(name, audio)
    result = sender.told(name, "failed", "done")
    assert result.error is not None, result
    assert not result.error.dead_letter
    assert not result.error.retryable
    sender.submit(f"after-{name}", wav())
    assert sender.told(f"after-{name}", "done", "failed").state == "done"
