"""The port for job records. What every store promises; each adapter is tested against it by one contract suite.

The store knows four things: a record changes only by compare-and-set on its version; a change and its events are
stored together; events of a job are numbered from 1 without gaps; an idempotency key names one job. Leases, fencing
tokens and states are fields of the record, and the moves between them are in shared.jobs.machine, so every adapter has
the same ones.
"""

from __future__ import annotations

import builtins
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.errors import TransientError, UserError
from shared.schemas.job import Job, JobEvent, JobState


class JobStoreUnavailable(TransientError):
    """The job store did not answer."""

    default_code = "job_store_unavailable"


class JobNotFound(UserError):
    """There is no such job, or its record has expired."""

    default_code = "job_not_found"
    default_http_status = 404


class JobExists(UserError):
    """A job with this id is already stored."""

    default_code = "job_exists"
    default_http_status = 409


class IdempotencyConflict(UserError):
    """The idempotency key was used before with another request."""

    default_code = "idempotency_conflict"
    default_http_status = 422


class TooManyOpen(UserError):
    """The owner has as many jobs that have not ended as they may."""

    default_code = "too_many_jobs"
    default_http_status = 429


class VersionConflict(TransientError):
    """The record changed since it was read: read it again and decide anew."""

    default_code = "version_conflict"


@dataclass(frozen=True)
class Idempotency:
    """A client's key for one request, and a fingerprint of the request's body.

    Keys of different job owners never meet.
    """

    key: str
    fingerprint: str
    keep_s: float = 86_400.0


@dataclass(frozen=True)
class Created:
    """The job of a request, and whether this call made it (False: an earlier one with the same idempotency key did)."""

    job: Job
    is_new: bool


@dataclass(frozen=True)
class JobPage:
    """Some jobs, newest first, and the cursor of the next page; None on the last."""

    jobs: builtins.list[Job]
    cursor: str | None


class JobStore(Protocol):
    """Where job records and their event logs lie. Every method may be called by any thread."""

    def now(self) -> float:
        """Unix seconds by the store's own clock, which all leases go by."""
        ...

    def create(
        self,
        job: Job,
        events: Sequence[JobEvent] = (),
        *,
        idempotency: Idempotency | None = None,
        open_max: int | None = None,
    ) -> Created:
        """Store a new job with its first events, as version 1; survives a crash of the caller once it returns.

        With an idempotency key that was used before within `keep_s` it stores nothing: the earlier job comes back if
        the fingerprint is the same, else IdempotencyConflict. `open_max` is the most jobs of the owner that have not
        ended, this one included; of many that come at once no more get in. Raises JobExists, TooManyOpen.
        """
        ...

    def count_open(self, owner: str) -> int:
        """How many jobs of an owner have not ended. Cheap, however many have."""
        ...

    def get(self, job_id: str) -> Job:
        """The record. Raises JobNotFound."""
        ...

    def replace(self, job: Job, events: Sequence[JobEvent] = ()) -> Job:
        """Store `job` and append `events` if the stored version is still `job.version`.

        The stored record, its version one higher.

        The events' `seq` is given by the store. Raises VersionConflict, JobNotFound.
        """
        ...

    def events(self, job_id: str, *, after: int = 0, limit: int = 1000, wait_s: float = 0.0) -> builtins.list[JobEvent]:
        """Events with a `seq` above `after`, in order; waits up to `wait_s` for the first. Raises JobNotFound."""
        ...

    def list(
        self, *, owner: str | None = None, states: Collection[JobState] = (), limit: int = 50, cursor: str | None = None
    ) -> JobPage:
        """Jobs by falling id (newest first), of one owner and in some states if given."""
        ...

    def due(self, before: float, limit: int = 100) -> builtins.list[Job]:
        """Jobs that have not ended and whose `due_at` is at or before `before`, the most overdue first."""
        ...

    def purge(self, before: float, limit: int = 100) -> builtins.list[str]:
        """Forget ended jobs whose `expires_at` is at or before `before`, with their events; their ids."""
        ...

    def ping(self) -> None:
        """Return if the store answers; raise JobStoreUnavailable otherwise."""
        ...

    def close(self) -> None:
        """Close the client. Safe to call twice."""
        ...
