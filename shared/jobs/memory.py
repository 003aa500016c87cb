"""Job records in this process's memory: for tests and for work that need not outlive the process."""

from __future__ import annotations

import builtins
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from shared.jobs.port import (
    Created,
    Idempotency,
    IdempotencyConflict,
    JobExists,
    JobNotFound,
    JobPage,
    TooManyOpen,
    VersionConflict,
)
from shared.schemas.job import Job, JobEvent, JobState


class MemoryJobStore:
    """A JobStore whose promises end with the process. `clock` gives Unix seconds."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._jobs: dict[str, Job] = {}
        self._events: dict[str, builtins.list[JobEvent]] = {}
        self._open: Counter[str] = Counter()  # owner -> jobs that have not ended
        self._keys: dict[tuple[str, str], tuple[str, str, float]] = {}  # (owner, key) -> (fingerprint, job id, until)

    def now(self) -> float:
        return self._clock()

    def create(
        self,
        job: Job,
        events: Sequence[JobEvent] = (),
        *,
        idempotency: Idempotency | None = None,
        open_max: int | None = None,
    ) -> Created:
        with self._changed:
            if idempotency is not None:
                known = self._keys.get((job.owner, idempotency.key))
                if known is not None and known[2] > self.now() and known[1] in self._jobs:
                    if known[0] != idempotency.fingerprint:
                        raise idempotency_conflict(idempotency.key)
                    return Created(self._jobs[known[1]], is_new=False)
            if job.id in self._jobs:
                raise JobExists(f"The job {job.id} is already stored.")
            if open_max is not None and self.count_open(job.owner) >= open_max:
                raise too_many_open(open_max)
            if idempotency is not None:
                until = self.now() + idempotency.keep_s
                self._keys[job.owner, idempotency.key] = idempotency.fingerprint, job.id, until
            stored = job.model_copy(update={"version": 1})
            self._open[job.owner] += not job.is_terminal
            self._jobs[job.id], self._events[job.id] = stored, []
            self._append(job.id, events)
            return Created(stored, is_new=True)

    def count_open(self, owner: str) -> int:
        with self._changed:
            return self._open[owner]

    def get(self, job_id: str) -> Job:
        with self._changed:
            return self._get(job_id)

    def replace(self, job: Job, events: Sequence[JobEvent] = ()) -> Job:
        with self._changed:
            known = self._get(job.id)
            if known.version != job.version:
                raise VersionConflict(f"The job {job.id} is no longer at version {job.version}.")
            stored = job.model_copy(update={"version": job.version + 1})
            self._open[job.owner] += known.is_terminal - job.is_terminal
            self._jobs[job.id] = stored
            self._append(job.id, events)
            return stored

    def events(self, job_id: str, *, after: int = 0, limit: int = 1000, wait_s: float = 0.0) -> builtins.list[JobEvent]:
        with self._changed:
            self._get(job_id)
            if wait_s > 0:
                self._changed.wait_for(lambda: len(self._events.get(job_id, ())) > after, wait_s)
            return self._events.get(job_id, [])[after : after + limit]

    def list(
        self, *, owner: str | None = None, states: Collection[JobState] = (), limit: int = 50, cursor: str | None = None
    ) -> JobPage:
        with self._changed:
            found = [
                self._jobs[job_id]
                for job_id in sorted(self._jobs, reverse=True)
                if (cursor is None or job_id < cursor)
                and (owner is None or self._jobs[job_id].owner == owner)
                and (not states or self._jobs[job_id].state in states)
            ][: limit + 1]
        return JobPage(found[:limit], found[limit - 1].id if len(found) > limit else None)

    def due(self, before: float, limit: int = 100) -> builtins.list[Job]:
        with self._changed:
            found = [job for job in self._jobs.values() if not job.is_terminal and job.due_at <= before]
        return sorted(found, key=lambda job: job.due_at)[:limit]

    def purge(self, before: float, limit: int = 100) -> builtins.list[str]:
        with self._changed:
            gone = [
                job.id
                for job in self._jobs.values()
                if job.is_terminal and job.expires_at is not None and job.expires_at <= before
            ][:limit]
            for job_id in gone:
                del self._jobs[job_id], self._events[job_id]
            self._keys = {key: known for key, known in self._keys.items() if known[1] in self._jobs}
        return gone

    def ping(self) -> None:
        return

    def close(self) -> None:
        return

    def _get(self, job_id: str) -> Job:
        if job_id not in self._jobs:
            raise JobNotFound(f"There is no job {job_id}.")
        return self._jobs[job_id]

    def _append(self, job_id: str, events: Sequence[JobEvent]) -> None:
        log = self._events[job_id]
        for event in events:
            log.append(event.model_copy(update={"seq": len(log) + 1}))
        self._changed.notify_all()


def too_many_open(open_max: int) -> TooManyOpen:
    """The error for one job more than an owner may have open."""
    return TooManyOpen(f"{open_max} of your jobs have not ended, as many as may be.",
                       "Wait for some to end, or cancel them.")  # fmt: skip


def idempotency_conflict(key: str) -> IdempotencyConflict:
    """The error for a key that came with another request."""
    return IdempotencyConflict(
        f"The idempotency key {key!r} was used before with another request.", "Use a new key for a new request."
    )
