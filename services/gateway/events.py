"""A job's events as server-sent events, and waiting for its end. Each waiting call holds one thread of its own pool."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator

from services.gateway.gateway import Gateway
from services.gateway.submission import view
from services.gateway.threads import blocking, patiently
from shared.errors import TransientError
from shared.jobs.port import JobNotFound
from shared.schemas import Job, JobEvent

WAIT_S = 1.0
RETRY_MS = 2000
CONTENT_TYPE = "text/event-stream"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def sse(event: str, data: object, identity: int | None = None) -> bytes:
    """One server-sent event."""
    head = "" if identity is None else f"id: {identity}\n"
    return f"{head}event: {event}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


async def job_events(gateway: Gateway, job: Job, after: int) -> AsyncIterator[bytes]:
    """The events after number `after`, as they come, to the job's last; comments while there are none.

    The last event carries the whole job.
    """
    with gateway.listeners:
        gateway.metrics.listeners.set(gateway.listeners.count)
        yield f"retry: {RETRY_MS}\n\n".encode()
        spoke = time.monotonic()
        while True:
            try:
                events = await _next(gateway, job.id, after)
                is_over = not events and (await blocking(gateway.backend.jobs.get, job.id)).is_terminal
            except JobNotFound:
                yield sse("job.deleted", {"job_id": job.id})
                return
            except TransientError:
                return  # the client comes back with Last-Event-ID
            if is_over:
                return  # the reader has seen the last event
            for event in events:
                after, spoke = event.seq, time.monotonic()
                yield sse(f"job.{event.type}", await _document(gateway, event), event.seq)
                if event.is_last:
                    return
            if time.monotonic() - spoke > gateway.settings.heartbeat_s:
                spoke = time.monotonic()
                yield b": alive\n\n"


async def ended(gateway: Gateway, job: Job, wait_s: float) -> Job:
    """The job once it has ended, or as it is after `wait_s`."""
    until, after = time.monotonic() + wait_s, 0
    with gateway.listeners:
        while (left := until - time.monotonic()) > 0 and not job.is_terminal:
            events = await _next(gateway, job.id, after, min(left, WAIT_S))
            after = events[-1].seq if events else after
            if any(event.is_last for event in events):
                break
    return await blocking(gateway.backend.jobs.get, job.id)


async def _next(gateway: Gateway, job_id: str, after: int, wait_s: float = WAIT_S) -> list[JobEvent]:
    jobs = gateway.backend.jobs
    return await patiently(lambda: jobs.events(job_id, after=after, wait_s=wait_s), gateway.listeners.limiter)


async def _document(gateway: Gateway, event: JobEvent) -> dict[str, object]:
    document = event.model_dump(mode="json")
    if event.is_last:
        job = await blocking(gateway.backend.jobs.get, event.job_id)
        document["job"] = (await blocking(view, gateway, job)).model_dump(mode="json")
    return document
