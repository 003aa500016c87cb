"""The moves that a job may make: pure functions from a record to the next record and its events.

A move that is not allowed raises, and nothing is written. Whoever holds the current step's lease carries its fencing
token; a write with any other token is refused (`Fenced`), so a worker that was paused or cut off cannot undo what its
successor did. Knows nothing about where records are kept; `apply` runs a move against any JobStore.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import PermanentError, TransientError, UserError
from shared.jobs.port import JobStore, VersionConflict
from shared.schemas.job import EventType, Job, JobError, JobEvent, JobState, LeaseState, StepTiming, new_job_id
from shared.schemas.request import JobRequest
from shared.schemas.route import build_route

DISPATCH_GRACE_S = 30.0
"""How long a job may wait for its message to be published before the sweeper publishes it."""
QUEUE_GRACE_S = 600.0
"""How long a published message may wait in its queue before the sweeper publishes it again."""
CONFLICTS_MAX = 50


class JobClosed(UserError):
    """The job has already ended."""

    default_code = "job_closed"
    default_http_status = 409


class Fenced(PermanentError):
    """The caller's lease of the step is no longer the current one: another worker took over, or the job ended."""

    default_code = "fenced"


class StaleStep(PermanentError):
    """The job has moved past this step."""

    default_code = "stale_step"


class FutureStep(TransientError):
    """The job has not reached this step."""

    default_code = "future_step"


class NotNow(TransientError):
    """The step cannot start before `until` (Unix seconds): another worker holds its lease, or it waits for a retry."""

    default_code = "not_now"

    def __init__(self, message: str, until: float) -> None:
        super().__init__(message)
        self.until = until


@dataclass(frozen=True)
class Move:
    """The next record of a job and the events that tell of it."""

    job: Job
    events: tuple[JobEvent, ...] = ()


def accept(
    request: JobRequest,
    now: float,
    *,
    job_id: str | None = None,
    owner: str = "local",
    trace: Mapping[str, str] | None = None,
    keep_s: float | None = None,
) -> Move:
    """A new job for a request; to be stored before the client hears that it was accepted."""
    job_id = job_id or new_job_id()
    job = Job(
        id=job_id,
        owner=owner,
        request=request,
        route=build_route(job_id, request),
        created_at=now,
        updated_at=now,
        due_at=now + DISPATCH_GRACE_S,
        deadline=None if request.timeout_s is None else now + request.timeout_s,
        expires_at=None if keep_s is None else now + keep_s,
        trace=dict(trace or {}),
    )
    return Move(job, (_event(job, "accepted", now),))


def dispatched(job: Job, step_index: int, now: float) -> Move:
    """The message of a step is on the bus. Nothing changes when the job has moved on since."""
    if job.is_terminal or job.step_index != step_index or (job.lease is not None and job.lease.expires_at > now):
        return Move(job)
    return Move(_next(job, now, dispatched=step_index, due_at=_queued_until(job, max(now, job.not_before), now)))


def acquire(job: Job, step_index: int, owner: str, ttl_s: float, now: float) -> Move:
    """Take the lease of the current step for `ttl_s` seconds, with a token above all earlier ones.

    Counts as an attempt.

    Raises JobClosed, StaleStep, FutureStep, NotNow.
    """
    if job.is_terminal:
        raise JobClosed(f"The job {job.id} is {job.state}.")
    if job.step_index > step_index:
        raise StaleStep(f"The job {job.id} is at step {job.step_index}, past step {step_index}.")
    if job.step_index < step_index:
        raise FutureStep(f"The job {job.id} is at step {job.step_index}, before step {step_index}.")
    if job.lease is not None and job.lease.expires_at > now:
        raise NotNow(f"{job.lease.owner} works on step {step_index} of the job {job.id}.", job.lease.expires_at)
    if job.not_before > now:
        raise NotNow(f"Step {step_index} of the job {job.id} waits for its next attempt.", job.not_before)
    token = job.last_token + 1
    taken = _next(
        job,
        now,
        state=JobState.RUNNING,
        lease=LeaseState(owner=owner, token=token, expires_at=now + ttl_s),
        last_token=token,
        attempts=job.attempts + 1,
        dispatched=step_index,
        started_at=job.started_at or now,
        step_started_at=now,
        due_at=now + ttl_s + DISPATCH_GRACE_S,
    )
    data = {"kind": job.step.kind, "iteration": job.step.iteration, "attempt": taken.attempts, "worker": owner}
    return Move(taken, (_event(taken, "started", now, data=data),))


def renew(job: Job, token: int, ttl_s: float, now: float) -> Move:
    """Hold the lease for another `ttl_s` seconds from now. Raises Fenced."""
    lease = _held(job, token)
    lease = lease.model_copy(update={"expires_at": now + ttl_s})
    return Move(_next(job, now, lease=lease, due_at=now + ttl_s + DISPATCH_GRACE_S))


def report(job: Job, token: int, fraction: float, note: str, now: float) -> Move:
    """Tell how far the current step is, 0 to 1; the job's progress counts all steps alike and never falls.

    Raises Fenced.
    """
    _held(job, token)
    progress = (job.step_index + min(max(fraction, 0.0), 1.0)) / len(job.route)
    moved = _next(job, now, progress=max(job.progress, progress), note=note)
    return Move(moved, (_event(moved, "progress", now),))


def check_held(job: Job, token: int) -> None:
    """Raise Fenced if the token is no longer that of the current step's lease."""
    _held(job, token)


def advance(
    job: Job,
    token: int,
    now: float,
    metrics: Mapping[str, float] | None = None,
    artifacts: Mapping[str, str] | None = None,
) -> Move:
    """The current step is done: on to the next one, or the job is done (cancelled, if that was asked for).

    `artifacts` are the SHA-256 sums of what it wrote, by name.

    The next step's message counts as queued already: should its publisher die, the message of this step comes again and
    has it published. Raises Fenced.
    """
    _held(job, token)
    started = now if job.step_started_at is None else job.step_started_at
    timing = StepTiming(
        index=job.step_index,
        kind=job.step.kind,
        started_at=started,
        finished_at=now,
        attempts=job.attempts,
        metrics=dict(metrics or {}),
        artifacts=dict(artifacts or {}),
    )
    moved = _next(
        job,
        now,
        step_index=job.step_index + 1,
        attempts=0,
        lease=None,
        not_before=0.0,
        timings=(*job.timings, timing),
        progress=max(job.progress, (job.step_index + 1) / len(job.route)),
        step_started_at=None,
        error=None,
        note="",
        due_at=_queued_until(job, now, now),
    )
    data = {"kind": timing.kind, "seconds": round(now - started, 3), **timing.metrics}
    done = _event(job.model_copy(update={"progress": moved.progress}), "step", now, data=data)
    if job.cancel_requested:
        return _close(moved, JobState.CANCELLED, now, (done,))
    if moved.step_index == len(job.route):
        return _close(moved, JobState.DONE, now, (done,))
    return Move(moved, (done,))


def retry(job: Job, token: int, error: JobError, delay_s: float, now: float) -> Move:
    """The attempt failed; the step may be tried again after `delay_s`. Raises Fenced."""
    _held(job, token)
    until = now + delay_s
    moved = _next(job, now, lease=None, not_before=until, error=error, due_at=until + DISPATCH_GRACE_S)
    data = {"code": error.code, "message": error.message, "delay_s": round(delay_s, 3), "attempt": job.attempts}
    return Move(moved, (_event(moved, "retry", now, data=data),))


def release(job: Job, token: int, now: float, delay_s: float = 0.0) -> Move:
    """Give the lease back unused (a worker drains, models are away): the attempt does not count, and the next one comes
    after `delay_s` at the earliest.

    Raises Fenced.
    """
    _held(job, token)
    until = now + delay_s
    moved = _next(job, now, lease=None, attempts=job.attempts - 1, not_before=until, due_at=until + DISPATCH_GRACE_S)
    return Move(moved)


def fail(job: Job, token: int, error: JobError, now: float) -> Move:
    """The job ends as failed. Raises Fenced."""
    _held(job, token)
    return _close(_next(job, now, error=error), JobState.FAILED, now, data=error.model_dump(exclude={"dead_letter"}))


def request_cancel(job: Job, now: float) -> Move:
    """Cancel: at once when nobody works on the job, else as soon as its worker notices.

    Raises JobClosed once it ended.
    """
    if job.state == JobState.CANCELLED:
        return Move(job)
    if job.is_terminal:
        raise JobClosed(f"The job {job.id} is {job.state} and cannot be cancelled.")
    if job.lease is None or job.lease.expires_at <= now:
        return _close(_next(job, now, cancel_requested=True), JobState.CANCELLED, now)
    if job.cancel_requested:
        return Move(job)
    moved = _next(job, now, cancel_requested=True)
    return Move(moved, (_event(moved, "cancel_requested", now),))


def discard(job: Job, now: float) -> Move:
    """Forget the job, with its artifacts, at the next purge after it has ended; an open job is cancelled as well.

    The record of one that waits in a queue stays until its message has been seen.
    """
    queued = not job.is_terminal and (job.lease is None or job.lease.expires_at <= now)
    gone = _next(job, now, discarded=True, expires_at=now + QUEUE_GRACE_S if queued else now)
    return Move(gone) if job.is_terminal else request_cancel(gone, now)


def close_cancelled(job: Job, token: int, now: float) -> Move:
    """The worker stopped because of a cancel: the job ends as cancelled. Raises Fenced."""
    _held(job, token)
    return _close(job, JobState.CANCELLED, now)


def apply(jobs: JobStore, job_id: str, move: Callable[[Job, float], Move], known: Job | None = None) -> Job:
    """Run a move on a stored job; reads and decides anew when the record changed in between.

    `known` saves the first reading for a caller that has just stored the record itself. Returns the stored record.
    """
    for tries in range(CONFLICTS_MAX):
        job = known or jobs.get(job_id)
        known = None
        moved = move(job, jobs.now())
        if moved.job is job:
            return job
        try:
            return jobs.replace(moved.job, moved.events)
        except VersionConflict:
            time.sleep(random.uniform(0, 0.002 * (tries + 1)))
    raise VersionConflict(f"The job {job_id} changed {CONFLICTS_MAX} times in a row while it was written.")


def _queued_until(job: Job, since: float, now: float) -> float:
    """When the sweeper looks after a message that is in its queue `since` then."""
    until = since + QUEUE_GRACE_S
    return until if job.deadline is None else min(until, max(job.deadline, now + DISPATCH_GRACE_S))


def _held(job: Job, token: int) -> LeaseState:
    if job.is_terminal or job.lease is None or job.lease.token != token:
        held = "nobody" if job.lease is None else f"{job.lease.owner} with token {job.lease.token}"
        raise Fenced(f"Token {token} no longer holds the job {job.id}: it is {job.state}, held by {held}.")
    return job.lease


def _next(job: Job, now: float, **changes: Any) -> Job:
    return job.model_copy(update={"updated_at": max(now, job.updated_at), **changes})


def _close(
    job: Job, state: JobState, now: float, before: tuple[JobEvent, ...] = (), data: dict[str, Any] | None = None
) -> Move:
    progress = 1.0 if state == JobState.DONE else job.progress
    closed = _next(job, now, state=state, lease=None, finished_at=now, progress=progress, note="")
    names: dict[JobState, EventType] = {
        JobState.DONE: "done",
        JobState.FAILED: "failed",
        JobState.CANCELLED: "cancelled",
    }
    return Move(closed, (*before, _event(closed, names[state], now, data=data)))


def _event(job: Job, type_: EventType, now: float, data: dict[str, Any] | None = None) -> JobEvent:
    return JobEvent(
        job_id=job.id,
        at=now,
        type=type_,
        state=job.state,
        step_index=job.step_index,
        progress=job.progress,
        note=job.note,
        data=data or {},
    )
