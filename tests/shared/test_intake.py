"""Submissions over the bus: one job each, rejections with a reason, nothing lost while something is away."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.bus import memory
from shared.bus.memory import MemoryBus
from shared.bus.port import RECORD_BYTES_MAX, Subscription
from shared.checkpoints.layout import Checkpoint
from shared.deadletters import dead_letters, replay
from shared.errors import UserError
from shared.intake import Intake
from shared.jobs.memory import MemoryJobStore
from shared.jobs.port import JobStoreUnavailable
from shared.outbox import recall
from shared.recordings import Consent, Voice, voice_key
from shared.schemas import Job
from shared.schemas.exchange import AUDIO_BYTES_MAX, RESULTS, SUBMISSIONS, Result, Submission
from shared.store.folder import FolderStore

PATIENCE_S = 15.0


class ShakyJobs(MemoryJobStore):
    """Refuses the first few records."""

    refusals = 0

    def create(self, job: Job, *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
        if self.refusals > 0:
            self.refusals -= 1
            raise JobStoreUnavailable("away for a moment")
        return super().create(job, *args, **kwargs)  # type: ignore[arg-type]


@dataclass
class World:
    bus: MemoryBus
    store: FolderStore
    jobs: ShakyJobs
    results: Subscription
    steps: Subscription

    def submit(self, name: str = "one", **changes: object) -> None:
        document = {
            "submission_id": name, "request": {"edit": {"type": "denoise"}},
            "audio": base64.b64encode(b"RIFF").decode(), **changes,
        }  # fmt: skip
        self.bus.publish(
            SUBMISSIONS,
            name,
            json.dumps(document).encode(),
            (("traceparent", b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01"),),
        )

    def due(self, count: int, reader: Subscription, patience_s: float = PATIENCE_S) -> list[bytes]:
        found: list[bytes] = []
        until = time.monotonic() + patience_s
        while len(found) < count and time.monotonic() < until:
            found += [record.value for record in reader.poll(0.05, max_records=10)]
        return found

    def result(self) -> Result:
        """The next result that tells of more than that a job was accepted."""
        while True:
            result = Result.model_validate_json(self.due(1, self.results)[0])
            if result.state != "accepted":
                return result


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    bus, store, jobs = MemoryBus(), FolderStore(tmp_path), ShakyJobs()
    world = World(bus, store, jobs, bus.subscribe([RESULTS], "me"), bus.subscribe(["editx.tokenize"], "workers"))
    intake = Intake(bus, store, jobs, keep_s=3600.0, poll_s=0.05)
    thread = threading.Thread(target=intake.run)
    thread.start()
    yield world
    intake.stop()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_a_submission_becomes_a_job_whose_first_step_is_due(world: World) -> None:
    world.submit()
    [step] = world.due(1, world.steps)
    job = world.jobs.get(json.loads(step)["job_id"])
    assert (job.reference, job.owner, job.trace["traceparent"][3:35]) == ("one", "local", "1" * 32)
    assert world.store.get(job.step.inputs["audio"]) == b"RIFF"
    assert job.expires_at is not None


def test_a_job_is_told_as_accepted_before_its_step_is_due(world: World) -> None:
    world.submit()
    [step] = world.due(1, world.steps)
    [told] = world.due(1, world.results)
    result = Result.model_validate_json(told)
    assert (result.state, result.submission_id) == ("accepted", "one")
    assert result.job_id == json.loads(step)["job_id"]


def test_an_upload_becomes_the_jobs_own_recording(world: World) -> None:
    upload = "upl_" + "1" * 32
    world.store.put(f"uploads/ann/{upload}", b"RIFF")
    world.submit(audio=None, upload_id=upload, owner="ann")
    [step] = world.due(1, world.steps)
    job = world.jobs.get(json.loads(step)["job_id"])
    assert world.store.get(f"jobs/{job.id}/source/audio") == b"RIFF"
    world.submit("two", audio=None, upload_id=upload, owner="bob")
    result = world.result()
    assert (result.error and result.error.code, result.owner) == ("upload_not_found", "bob")


def test_a_stored_voice_brings_its_recording_and_its_words(world: World) -> None:
    consent = Consent(kind="attestation", statement="I agree.", by="Ada", given_at=0.0)
    voice = Voice(id="voice_" + "2" * 24, name="Ada", text="What she says.", duration_s=1.0, sha256="", created_at=0.0,
                  consent=consent)  # fmt: skip
    world.store.put(voice_key("ann", voice.id, "reference"), b"RIFF")
    world.store.put(voice_key("ann", voice.id, "voice.json"), voice.model_dump_json().encode())
    clone = {"edit": {"type": "clone", "target_text": "Hello."}}
    world.submit(audio=None, voice="Ada", owner="ann", request=clone)
    [step] = world.due(1, world.steps)
    job = world.jobs.get(json.loads(step)["job_id"])
    assert job.request.text == "What she says."
    assert job.route.steps[1].parameters["text"] == "What she says."
    assert world.store.get(job.step.inputs["audio"]) == b"RIFF"
    world.submit("two", audio=None, voice="Eve", owner="ann", request=clone)
    result = world.result()
    assert result.error is not None
    assert result.error.code == "voice_not_found"


def test_a_webhook_is_left_for_a_gateway_to_send(world: World) -> None:
    request = {"edit": {"type": "denoise"}, "webhook_url": "https://example.org/hook"}
    world.submit(request=request)
    world.submit("two", request={**request, "edit": {"type": "vad"}})
    jobs = [json.loads(step)["job_id"] for step in world.due(2, world.steps)]
    assert [recall(world.store, job_id)[0] for job_id in jobs] == [0, 0]
    world.submit(request=request)  # again: it makes no job, and leaves nothing to be told
    world.due(1, world.results)
    assert len(list(world.store.list("webhooks/"))) == 2


def test_what_the_checkpoint_cannot_do_is_rejected(tmp_path: Path) -> None:
    checkpoint = Checkpoint.resolve("nano")
    intake = Intake(MemoryBus(), FolderStore(tmp_path), MemoryJobStore(), checkpoint=checkpoint)
    russian = {"edit": {"type": "style", "detail": "whisper"}, "text": "Добрый день, друзья"}
    audio = base64.b64encode(b"RIFF").decode()
    with pytest.raises(UserError, match="Cyrillic"):
        intake.accept(Submission.model_validate({"submission_id": "x", "request": russian, "audio": audio}))


def test_a_submission_with_a_wrong_request_is_answered_with_the_reason(world: World) -> None:
    world.submit(request={"edit": {"type": "sing"}}, owner="ann")
    result = world.result()
    assert (result.state, result.submission_id, result.owner) == ("rejected", "one", "ann")
    assert result.error is not None
    assert "request.edit.type" in result.error.message
    assert len(list(dead_letters(world.bus, quiet_s=0.3))) == 1


def test_the_same_submission_sent_again_is_one_job(world: World) -> None:
    for _ in range(3):
        world.submit()
    assert len(world.due(2, world.steps, patience_s=1.0)) == 1
    assert len(world.jobs.list().jobs) == 1


def test_another_request_under_a_known_id_is_rejected(world: World) -> None:
    world.submit()
    world.submit(request={"edit": {"type": "vad"}})
    result = world.result()
    assert (result.state, result.submission_id, result.job_id) == ("rejected", "one", "")
    assert result.error is not None
    assert result.error.code == "idempotency_conflict"


def test_an_unknown_tag_is_rejected_with_the_nearest_known_one(world: World) -> None:
    world.submit(request={"edit": {"type": "emotion", "detail": "hapy"}, "text": "Hello."})
    result = world.result()
    assert result.error is not None
    assert "happy" in f"{result.error.message} {result.error.hint}"


def test_a_recording_that_is_not_there_is_rejected(world: World) -> None:
    request = {"edit": {"type": "denoise"}, "source_key": "uploads/nowhere"}
    world.submit(audio=None, request=request)
    result = world.result()
    assert result.error is not None
    assert result.error.code == "artifact_not_found"


@pytest.mark.parametrize(
    "value",
    [b"", b"not json", b"{}", b'{"schema_version": 2}', b"\xff" * 100,
     json.dumps({"submission_id": "x", "request": {"edit": {"type": "denoise"}},
                 "audio": base64.b64encode(bytes(AUDIO_BYTES_MAX + 1)).decode()}).encode()],
)  # fmt: skip
def test_what_is_no_submission_goes_to_the_dead_letters_with_its_reason(world: World, value: bytes) -> None:
    world.bus.publish(SUBMISSIONS, "bad", value)
    world.submit("good")
    assert len(world.due(1, world.steps)) == 1
    [letter] = list(dead_letters(world.bus, quiet_s=0.3))
    assert (letter.delivery.value, letter.document()["code"]) == (value, "unreadable_message")
    assert letter.document()["origin"]["topic"] == SUBMISSIONS


def test_a_record_larger_than_any_bus_takes_is_put_aside_by_its_beginning(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge, junk = b"x" * (RECORD_BYTES_MAX + 1000), tuple((f"junk-{n}", bytes(2000)) for n in range(20))
    with monkeypatch.context() as patch:
        patch.setattr(memory, "check_size", lambda topic, value: None)
        world.bus.publish(SUBMISSIONS, "huge", huge, (("traceparent", b"00-x"), *junk))
    world.submit("good")
    assert len(world.due(1, world.steps)) == 1
    [letter] = list(dead_letters(world.bus, quiet_s=0.3))
    assert letter.delivery.value == huge[:RECORD_BYTES_MAX]
    assert letter.headers["x-editx-cut"] == str(len(huge))
    assert (letter.headers["traceparent"], "junk-0" in letter.headers) == ("00-x", False)
    with pytest.raises(UserError, match="not here whole"):
        replay(letter, world.bus, world.jobs, world.store)


def test_a_defect_in_taking_one_submission_holds_no_other_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(self: Intake, submission: Submission, trace: dict[str, str]) -> None:
        if submission.submission_id == "odd":
            raise ValueError("nobody foresaw this")
        answer(self, submission, trace)

    answer = Intake._answer
    monkeypatch.setattr(Intake, "_answer", defect)
    world.submit("odd")
    world.submit("good")
    assert len(world.due(1, world.steps)) == 1
    [letter] = list(dead_letters(world.bus, quiet_s=0.3))
    assert "nobody foresaw this" in letter.document()["reason"]


def test_an_unreadable_message_is_replayed_to_its_topic(world: World) -> None:
    world.bus.publish(SUBMISSIONS, "bad", b"not json")
    [letter] = list(dead_letters(world.bus, quiet_s=1.0))
    assert replay(letter, world.bus, world.jobs, world.store) is None
    until = time.monotonic() + PATIENCE_S
    while len(letters := list(dead_letters(world.bus, quiet_s=0.3))) < 2:
        assert time.monotonic() < until
    assert {one.delivery.value for one in letters} == {b"not json"}


def test_a_submission_waits_while_the_job_store_is_away(world: World) -> None:
    world.jobs.refusals = 1
    world.submit()
    world.submit("two")
    assert len(world.due(2, world.steps)) == 2
