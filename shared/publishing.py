"""Putting messages on the bus: the next step of a job, and the dead letters. Knows nothing about how steps are done."""

from __future__ import annotations

import json
from collections.abc import Mapping

from shared import telemetry
from shared.bus.port import RECORD_BYTES_MAX, Bus, Delivery, Headers
from shared.errors import EditxError
from shared.jobs import machine
from shared.jobs.port import JobStore
from shared.retry import job_error
from shared.schemas.exchange import RESULTS, Result
from shared.schemas.job import Job, JobError
from shared.schemas.messages import TRACE_HEADERS, BusMessage
from shared.schemas.route import DLQ_FAILED, DLQ_UNREADABLE

KEPT_HEADERS = (*TRACE_HEADERS, "content-type", "schema-version", "job-id")
HEADER_BYTES_MAX = 16_000
"""What a dead letter keeps of the headers of its message; of more than that, only KEPT_HEADERS."""


def publish_step(bus: Bus, jobs: JobStore, job: Job) -> Job:
    """Publish the message of a job's current step and note that in its record, for whoever has no message that would
    come again if it died in between.

    Raises BusUnavailable: nothing is noted then.
    """
    publish_next(bus, job)
    return machine.apply(jobs, job.id, lambda stored, now: machine.dispatched(stored, job.step_index, now), job)


def publish_next(bus: Bus, job: Job) -> None:
    """Publish the message of a job's current step. Raises BusUnavailable."""
    message = BusMessage.for_step(job)
    with telemetry.sending(message.topic, job.id, parent=job.trace, system=bus.system):
        trace = telemetry.inject() or dict(job.trace)
        bus.publish(message.topic, *message.model_copy(update={"trace": trace}).to_record())


def publish_unreadable(bus: Bus, delivery: Delivery, error: EditxError) -> None:
    """Put a message that cannot be read aside as it came, with the reason and its origin in the headers.

    Of one that is larger than a record may be, its beginning; x-editx-cut says how many bytes there were.
    """
    _publish(bus, DLQ_UNREADABLE, delivery, error.code, error.message, {})


def publish_failed(bus: Bus, delivery: Delivery, error: JobError, attempts: int) -> None:
    """Put the message of a failed step aside; the headers say why, from where, and after how many attempts."""
    _publish(bus, DLQ_FAILED, delivery, error.code, error.message, {"attempt": str(attempts)})


def publish_result(bus: Bus, job: Job) -> None:
    """Tell on the topic of results how a job ended, or that it was accepted.

    It may be told twice; readers go by the job's id.
    """
    _publish_document(bus, job.id, Result.of(job), job.trace)


def publish_rejection(bus: Bus, submission_id: str, owner: str, error: EditxError) -> None:
    """Tell on the topic of results that a submission did not become a job, and why."""
    result = Result(submission_id=submission_id, owner=owner, state="rejected", error=job_error(error))
    _publish_document(bus, submission_id, result, {})


def _publish_document(bus: Bus, key: str, result: Result, parent: dict[str, str]) -> None:
    with telemetry.sending(RESULTS, key, parent=parent, system=bus.system):
        headers = {"content-type": "application/json", "schema-version": "1", **telemetry.inject()}
        encoded = tuple((name, text.encode()) for name, text in headers.items())
        bus.publish(RESULTS, key, result.model_dump_json().encode(), encoded)


def _publish(bus: Bus, topic: str, delivery: Delivery, code: str, reason: str, changed: Mapping[str, str]) -> None:
    origin = {"topic": delivery.topic, "partition": delivery.partition.number, "offset": delivery.offset}
    facts = {**changed, "x-editx-code": code, "x-editx-reason": reason[:2000], "x-editx-origin": json.dumps(origin)}
    if len(delivery.value) > RECORD_BYTES_MAX:
        facts["x-editx-cut"] = str(len(delivery.value))
    kept = [(name, value) for name, value in _bounded(delivery.headers) if name not in changed]
    headers = (*kept, *((name, text.encode("utf-8", "replace")) for name, text in facts.items()))
    with telemetry.sending(topic, delivery.key, system=bus.system):
        bus.publish(topic, delivery.key, delivery.value[:RECORD_BYTES_MAX], headers)


def _bounded(headers: Headers) -> Headers:
    """The headers that a dead letter keeps: all but our own, while a record has room for them."""
    kept = tuple((name, value) for name, value in headers if not name.startswith("x-editx-"))
    if sum(len(name) + len(value) for name, value in kept) <= HEADER_BYTES_MAX:
        return kept
    known = {name: value for name, value in kept if name in KEPT_HEADERS and len(value) <= HEADER_BYTES_MAX // 10}
    return tuple(known.items())
