"""Finds jobs that nobody will move on and puts them back on the bus; forgets expired ones with their artifacts, and
uploads that no job took within a day.

It makes up for a gateway that died between storing a job and publishing it, a worker that died between two steps, and
a bus that lost its records. A message too many does no harm. Several sweepers may run at once.
"""

from __future__ import annotations

import logging
import threading
import time

from shared.bus.port import Bus
from shared.errors import EditxError, TransientError
from shared.inference.port import DeadlineExceeded
from shared.jobs import machine
from shared.jobs.port import JobStore
from shared.publishing import publish_result, publish_step
from shared.recordings import UPLOADS
from shared.retry import job_error
from shared.schemas.job import Job
from shared.schemas.route import job_prefix
from shared.store.port import ArtifactStore

log = logging.getLogger(__name__)
LEASE_S = 30.0
UPLOADS_KEEP_S = 86_400.0
EXPIRE_EVERY_S = 600.0


class Sweeper:
    """Sweeps every `interval_s` seconds in a thread, or once when asked."""

    def __init__(self, jobs: JobStore, bus: Bus, store: ArtifactStore, interval_s: float = 5.0) -> None:
        self._jobs = jobs
        self._bus = bus
        self._store = store
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._expire_at = 0.0

    def start(self) -> None:
        """Begin sweeping in the background."""
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the background thread. Safe to call twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10.0)

    def sweep(self, *, everything: bool = False) -> int:
        """Look at overdue jobs once, or at all that have not ended (after a bus lost its records).

        How many were put back.
        """
        before = float("inf") if everything else self._jobs.now()
        moved = 0
        for job in self._jobs.due(before, limit=1_000):
            try:
                moved += self._put_back(job)
            except EditxError as error:
                log.warning("job %s could not be put back: %s", job.id, error)
        for job_id in self._jobs.purge(self._jobs.now()):
            self._store.delete_prefix(job_prefix(job_id))
        if time.monotonic() >= self._expire_at:
            self._expire_at = time.monotonic() + EXPIRE_EVERY_S
            self._store.expire(UPLOADS, UPLOADS_KEEP_S)
        return moved

    def _put_back(self, job: Job) -> bool:
        now = self._jobs.now()
        if job.lease is not None and job.lease.expires_at > now:
            return False
        if job.deadline is not None and job.deadline < now:
            self._fail_late(job)
            return False
        log.info("job %s waits at step %d (%s): its message is published again", job.id, job.step_index, job.step.kind)
        publish_step(self._bus, self._jobs, job)
        return True

    def _fail_late(self, job: Job) -> None:
        index = job.step_index
        held = machine.apply(self._jobs, job.id, lambda job, now: machine.acquire(job, index, "sweeper", LEASE_S, now))
        error = job_error(DeadlineExceeded(f"The deadline passed while the job waited for its step {index}."))
        failed = machine.apply(self._jobs, job.id, lambda job, now: machine.fail(job, held.last_token, error, now))
        publish_result(self._bus, failed)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                self.sweep()
            except TransientError as error:
                log.warning("the sweep was put off: %s", error)
            except Exception:
                log.exception("the sweep failed")
