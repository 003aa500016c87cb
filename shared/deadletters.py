"""The dead letters: what could not be read, and the steps that were given up. They are listed, and played again.

Playing a failed step again makes a new job of the same request, since a job ends once; an unreadable message goes back
to the topic it came from. Knows nothing about how they are shown.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shared import outbox
from shared.bus.port import Bus, Delivery
from shared.errors import UserError
from shared.jobs import machine
from shared.jobs.port import Idempotency, JobStore
from shared.publishing import publish_step
from shared.schemas.job import Job
from shared.schemas.route import DLQ_FAILED, DLQ_UNREADABLE, source_key
from shared.store.port import ArtifactStore

TOPICS = (DLQ_UNREADABLE, DLQ_FAILED)


@dataclass(frozen=True)
class DeadLetter:
    """One dead letter: the record as it lies on its topic, and what its headers say."""

    delivery: Delivery

    @property
    def id(self) -> str:
        """Its name for people: failed/PARTITION/OFFSET or unreadable/PARTITION/OFFSET."""
        return f"{self.delivery.topic.rpartition('.')[2]}/{self.delivery.partition.number}/{self.delivery.offset}"

    @property
    def headers(self) -> dict[str, str]:
        """The record's headers: x-editx-code, -reason, -origin and -cut, job-id, attempt, traceparent."""
        return {name: value.decode("utf-8", "replace") for name, value in self.delivery.headers}

    def document(self) -> dict[str, Any]:
        """Everything about the letter as plain data."""
        headers = self.headers
        return {
            "id": self.id,
            "code": headers.get("x-editx-code", ""),
            "reason": headers.get("x-editx-reason", ""),
            "origin": json.loads(headers.get("x-editx-origin", "{}")),
            "job_id": headers.get("job-id", self.delivery.key),
            "attempt": headers.get("attempt", ""),
            "traceparent": headers.get("traceparent", ""),
            "at": self.delivery.published_at,
            "value": self.delivery.value.decode("utf-8", "replace"),
        }


def dead_letters(bus: Bus, *, join_s: float = 20.0, quiet_s: float = 1.0) -> Iterator[DeadLetter]:
    """All letters that lie there now; nothing is taken away. Ends after `quiet_s` seconds without another one."""
    reader = bus.subscribe(TOPICS, f"editx-dlq-{uuid.uuid4().hex}")
    end_at = time.monotonic() + join_s
    joined = False
    try:
        while time.monotonic() < end_at:
            found = reader.poll(0.2, max_records=100)
            if found or (reader.assignment() and not joined):
                joined, end_at = True, time.monotonic() + quiet_s
            yield from map(DeadLetter, found)
    finally:
        reader.close()


def replay(letter: DeadLetter, bus: Bus, jobs: JobStore, store: ArtifactStore) -> Job | None:
    """Have it done again: the new job of a failed step, or None for a message that went back to its topic.

    Its webhook is left in the outbox, for a gateway to send. A letter that is replayed twice makes one job.

    Raises JobNotFound when the job has expired.
    """
    if letter.delivery.topic == DLQ_UNREADABLE:
        if "x-editx-cut" in letter.headers:
            raise UserError(f"{letter.id} was larger than a record may be: it is not here whole.",
                            "Have its sender send less.")  # fmt: skip
        origin = json.loads(letter.headers.get("x-editx-origin", "{}"))
        if "topic" not in origin:
            raise UserError(f"{letter.id} does not say where it came from.", "Publish its value by hand.")
        kept = tuple((name, value) for name, value in letter.delivery.headers if not name.startswith("x-editx-"))
        bus.publish(origin["topic"], letter.delivery.key, letter.delivery.value, kept)
        return None
    job = jobs.get(letter.delivery.key)
    request = job.request.model_copy(update={"source_key": job.request.source_key or source_key(job.id)})
    moved = machine.accept(request, jobs.now(), owner=job.owner, trace=job.trace)
    keep_s = None if job.expires_at is None else max(job.expires_at - job.created_at, 0.0)
    expires_at = None if keep_s is None else jobs.now() + keep_s
    again = moved.job.model_copy(update={"reference": job.reference, "expires_at": expires_at})
    once = Idempotency(f"replay:{letter.id}:{job.id}", job.id)
    if request.webhook_url is not None:
        outbox.remember(store, again.id, 0, jobs.now())
    created = jobs.create(again, moved.events, idempotency=once)
    if not created.is_new:
        store.delete(outbox.outbox_key(again.id))
        return created.job
    return publish_step(bus, jobs, created.job)
