"""One message, from reading it to having done its step: lease, handler, the job's next state, the next message.

Every way that it can end is a `Verdict`: the message is done and may be committed, or it should be looked at again
later. Knows nothing about polling, threads or offsets.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from shared import telemetry
from shared.bus.port import Bus, Delivery
from shared.errors import EditxError, PoisonError, TransientError
from shared.inference.port import DeadlineExceeded, InferenceUnavailable, RequestCancelled, UnknownModel
from shared.jobs import machine
from shared.jobs.machine import Fenced, FutureStep, JobClosed, NotNow, StaleStep
from shared.jobs.port import JobNotFound, JobStore
from shared.publishing import publish_failed, publish_next, publish_result, publish_unreadable
from shared.retry import RetryPolicy, job_error
from shared.schemas.job import Job, JobError, JobState
from shared.schemas.messages import BusMessage
from shared.steps import Attempt, Handler
from shared.store.port import ArtifactStore
from shared.surroundings import Surroundings

log = logging.getLogger(__name__)
LOOK_AGAIN_S = 1.0
WAIT_MAX_S = 5.0
PERSIST_EVERY_S = 0.2
EARLY_S = 1.0
"""A model server's clock may end a call this much before the job's deadline; earlier, it had other reasons."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of a message: done, or to be looked at again."""

    is_done: bool
    again_in_s: float = 0.0


DONE = Verdict(is_done=True)


def later(seconds: float) -> Verdict:
    """Look at the message again after some seconds; another worker may be done with it by then."""
    return Verdict(is_done=False, again_in_s=min(max(seconds, 0.01), WAIT_MAX_S))


@dataclass(frozen=True)
class Held:
    """The lease that an execution holds now."""

    job_id: str
    token: int


class ExecutionSettings(Protocol):
    """The part of a worker's settings that one execution needs."""

    @property
    def group(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def lease_s(self) -> float: ...
    @property
    def retry(self) -> RetryPolicy: ...


class Execution:
    """Runs one message, possibly several times.

    `stop` asks the handler to give up; `held` is the lease while it works.
    """

    def __init__(
        self,
        delivery: Delivery,
        handler: Handler,
        bus: Bus,
        store: ArtifactStore,
        jobs: JobStore,
        settings: ExecutionSettings,
        surroundings: Surroundings,
    ) -> None:
        self.stop = threading.Event()
        self.held: Held | None = None
        self._current: Attempt | None = None
        self._delivery = delivery
        self._handler = handler
        self._bus = bus
        self._store = store
        self._jobs = jobs
        self._settings = settings
        self._surroundings = surroundings
        self._leased_at = 0.0
        self._excused = 0
        self._draining = False

    def drain(self) -> None:
        """Ask the handler to give up and hand its step back as if it had never begun."""
        self._draining = True
        self.stop.set()

    def report(self) -> None:
        """Pass on how far the handler is, if it told since the last time. Raises Fenced, JobNotFound."""
        if self._current is not None:
            self._current.report()

    def keep(self, held: Held) -> Job:
        """Renew the lease once a third of it has passed, else only look whether it is still there; the job's record.

        Raises Fenced, JobNotFound.
        """
        if time.monotonic() - self._leased_at > self._settings.lease_s / 3:
            return self._renew(held)
        job = self._jobs.get(held.job_id)
        machine.check_held(job, held.token)
        return job

    def run(self) -> Verdict:
        """Do what the message asks for."""
        self.stop.clear()
        try:
            return self._read_and_process()
        except TransientError as error:
            log.warning("message %s waits: %s", self._delivery.offset, error)
            return later(LOOK_AGAIN_S)
        except Exception:
            log.exception("message %s was not done", self._delivery.offset)
            return later(LOOK_AGAIN_S)
        finally:
            self.held = self._current = None

    def _read_and_process(self) -> Verdict:
        delivery = self._delivery
        try:
            message = BusMessage.from_record(delivery.value, delivery.headers)
        except PoisonError as error:
            log.error("unreadable message at %s offset %d: %s", delivery.partition, delivery.offset, error)
            publish_unreadable(self._bus, delivery, error)
            return DONE
        with telemetry.processing(
            delivery.topic,
            message.trace,
            job_id=message.job_id,
            group=self._settings.group,
            partition=delivery.partition.number,
            offset=delivery.offset,
            attempt=message.attempt,
            system=self._bus.system,
        ):
            return self._process(message)

    def _process(self, message: BusMessage) -> Verdict:
        index, owner, ttl_s = message.step_index, self._settings.name, self._settings.lease_s
        asked_at = time.monotonic()
        try:
            job = machine.apply(
                self._jobs, message.job_id, lambda job, now: machine.acquire(job, index, owner, ttl_s, now)
            )
        except (JobNotFound, PoisonError) as error:
            publish_unreadable(self._bus, self._delivery, error)
            return DONE
        except JobClosed:
            return self._after_the_end(message)
        except StaleStep:
            return self._after_the_step(message)
        except NotNow as wait:
            return later(wait.until - self._jobs.now())
        except FutureStep:
            return later(LOOK_AGAIN_S)
        telemetry.attempted(job.attempts)
        self._leased_at = asked_at
        self.held = Held(job.id, job.last_token)
        try:
            return self._attempt(job)
        except Fenced as lost:
            log.warning("gave up step %d: %s", index, lost)
            return later(LOOK_AGAIN_S)

    def _attempt(self, job: Job) -> Verdict:
        if job.attempts > self._settings.retry.attempts_max:
            return self._fail(job, _exhausted(job))
        attempt = self._current = Attempt(job, self._jobs, self._store, self.stop, self._check_lease)
        began = time.perf_counter()
        try:
            attempt.check_cancelled()
            self._handler.run(attempt)
        except RequestCancelled as error:
            return self._stopped(job, error)
        except Fenced:
            raise
        except DeadlineExceeded as error:
            if attempt.deadline is None or time.monotonic() < attempt.deadline - EARLY_S:
                return self._failed(job, InferenceUnavailable(f"The model server had no time: {error.message}"))
            return self._fail(job, job_error(error))
        except Exception as error:
            self._count(job, "error", began)
            return self._failed(job, error)
        self._current = None
        self._count(job, "ok", began)
        token, metrics = job.last_token, attempt.metrics
        if (rtf := metrics.get("rtf")) is not None:
            telemetry.instruments().rtf.record(rtf, {"editx.step.kind": job.step.kind})
        written = attempt.written
        moved = self._persist(attempt.latest, lambda job, now: machine.advance(job, token, now, metrics, written))
        self.held = None
        if moved.is_terminal:
            publish_result(self._bus, moved)
        else:
            publish_next(self._bus, moved)
        return DONE

    def _renew(self, held: Held) -> Job:
        """Hold the lease from now on for its whole length. Raises Fenced, JobNotFound."""
        asked_at, ttl_s = time.monotonic(), self._settings.lease_s
        job = machine.apply(self._jobs, held.job_id, lambda job, now: machine.renew(job, held.token, ttl_s, now))
        self._leased_at = asked_at
        return job

    def _check_lease(self) -> None:
        """Before a write. A lease that is younger than half its length is surely ours; an older one is renewed first,
        which a worker that was paused or cut off cannot.

        Raises Fenced, JobNotFound.
        """
        if self.held is not None and time.monotonic() - self._leased_at > self._settings.lease_s / 2:
            self._renew(self.held)

    def _stopped(self, job: Job, error: RequestCancelled) -> Verdict:
        """The handler gave up: the job was cancelled, the worker drains, the lease is gone, or a model server ended."""
        token = job.last_token
        if self._jobs.get(job.id).cancel_requested:
            publish_result(self._bus, self._persist(job, lambda job, now: machine.close_cancelled(job, token, now)))
            return DONE
        if self._draining or self.stop.is_set():
            return self._hand_back(job)
        return self._failed(job, InferenceUnavailable(f"The model server broke the call off: {error.message}"))

    def _is_excused(self, error: Exception) -> bool:
        """Whether an outage is to blame. Not more often than a step is tried: one that kills its server must end."""
        if not isinstance(error, (TransientError, UnknownModel)) or self._excused >= self._settings.retry.attempts_max:
            return False
        away = self._surroundings.are_away()
        self._excused += away
        return away

    def _hand_back(self, job: Job, delay_s: float = 0.0) -> Verdict:
        """The step was not done and nobody is to blame: the attempt does not count."""
        token = job.last_token
        self._persist(job, lambda job, now: machine.release(job, token, now, delay_s))
        return later(LOOK_AGAIN_S)

    def _failed(self, job: Job, error: Exception) -> Verdict:
        policy, document, token = self._settings.retry, job_error(error), job.last_token
        telemetry.failed(error, document.code)
        if self._is_excused(error):
            log.warning("step %d of %s waits for what it needs: %s", job.step_index, job.id, error)
            return self._hand_back(job, policy.delay_s(self._excused))
        if not policy.allows(error, job.attempts):
            unforeseen = None if isinstance(error, EditxError) else error
            log.error(
                "step %d (%s) of %s failed: %s", job.step_index, job.step.kind, job.id, error, exc_info=unforeseen
            )
            return self._fail(job, document)
        delay_s = policy.delay_s(job.attempts)
        log.warning("step %d of %s failed, again in %.1f s: %s", job.step_index, job.id, delay_s, error)
        self._persist(job, lambda job, now: machine.retry(job, token, document, delay_s, now))
        return later(delay_s)

    def _fail(self, job: Job, error: JobError) -> Verdict:
        token = job.last_token
        failed = self._persist(job, lambda job, now: machine.fail(job, token, error, now))
        if error.dead_letter:
            publish_failed(self._bus, self._delivery, error, self._begun(failed))
        publish_result(self._bus, failed)
        return DONE

    def _after_the_end(self, message: BusMessage) -> Verdict:
        """The job has ended. What a worker that died may not have sent, a dead letter or the result, is sent now."""
        job = self._jobs.get(message.job_id)
        failed_here = job.state == JobState.FAILED and job.step_index == message.step_index
        if failed_here and job.error is not None and job.error.dead_letter:
            publish_failed(self._bus, self._delivery, job.error, self._begun(job))
        if message.step_index >= job.step_index - 1:
            publish_result(self._bus, job)
        return DONE

    def _begun(self, job: Job) -> int:
        """How often the job's step was really begun: the attempt that finds it exhausted does not begin it."""
        return min(job.attempts, self._settings.retry.attempts_max)

    def _after_the_step(self, message: BusMessage) -> Verdict:
        """The step is done. If a worker died before the next message was out, it is published now."""
        job = self._jobs.get(message.job_id)
        if not job.is_terminal and job.dispatched < job.step_index:
            publish_next(self._bus, job)
        return DONE

    def _persist(self, job: Job, move: Callable[[Job, float], machine.Move]) -> Job:
        """Store what came of the work, trying for as long as the lease lasts: doing the step again costs more."""
        until = time.monotonic() + self._settings.lease_s
        while True:
            try:
                return machine.apply(self._jobs, job.id, move, job)
            except TransientError:
                if time.monotonic() > until:
                    raise
                time.sleep(PERSIST_EVERY_S)

    def _count(self, job: Job, outcome: str, began: float) -> None:
        attributes = {"editx.step.kind": job.step.kind, "editx.outcome": outcome}
        telemetry.instruments().steps.record(time.perf_counter() - began, attributes)
        telemetry.instruments().outcomes.add(1, attributes)


def _exhausted(job: Job) -> JobError:
    """The error of a step that was begun too often: its last one, or that its workers died."""
    if job.error is not None:
        return job.error.model_copy(update={"dead_letter": True})
    return JobError(
        code="attempts_exhausted",
        message=f"Step {job.step_index} ({job.step.kind}) was begun {job.attempts - 1} times and never ended.",
        hint="The worker died each time; its log or the machine's memory may tell why.",
        dead_letter=True,
    )
