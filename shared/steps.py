"""What a step's handler sees: its job, its artifacts, and whether it should stop.

Handlers know nothing else of the system.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from shared.inference.port import DeadlineExceeded, RequestCancelled
from shared.jobs import machine
from shared.jobs.port import JobStore
from shared.schemas.job import Job
from shared.schemas.route import Step, StepKind
from shared.store.port import ArtifactStore

PROGRESS_EVERY_S = 0.5


class StepContext(Protocol):
    """One attempt at one step. `deadline` is by time.monotonic(), None without one; `priority` is for inference."""

    @property
    def job(self) -> Job: ...
    @property
    def step(self) -> Step: ...
    @property
    def deadline(self) -> float | None: ...
    @property
    def priority(self) -> int: ...

    def read(self, name: str) -> bytes:
        """The input artifact that the route names so. Raises ArtifactNotFound, StoreUnavailable."""
        ...

    def write(self, name: str, data: bytes, content_type: str = "application/octet-stream") -> None:
        """Store an output artifact of this step, whole. Raises Fenced once another worker may have the step."""
        ...

    def progress(self, fraction: float, note: str = "") -> None:
        """Tell how far this step is, 0 to 1. Cheap: most calls are not passed on."""
        ...

    def measure(self, name: str, value: float) -> None:
        """Keep a number about this step with the job, such as rtf."""
        ...

    def cancelled(self) -> bool:
        """Whether the work is no longer wanted; cheap."""
        ...

    def check_cancelled(self) -> None:
        """Raise RequestCancelled or DeadlineExceeded if the work should stop."""
        ...


class Handler(Protocol):
    """One kind of step. `run` may be called by several threads, and again for a step that it did before."""

    @property
    def kind(self) -> StepKind: ...

    def run(self, step: StepContext) -> None:
        """Do the step: read its inputs, write its outputs. An EditxError says whether to try again."""
        ...


class Attempt:
    """The StepContext of a worker.

    `stop` is set by the worker when the job is cancelled, the lease lost, or the worker drains; `check_lease` raises
    Fenced where it is lost. `latest` is the job's record as this attempt stored it last, `written` holds the SHA-256 of
    its artifacts by name.
    """

    def __init__(
        self,
        job: Job,
        jobs: JobStore,
        store: ArtifactStore,
        stop: threading.Event,
        check_lease: Callable[[], None],
    ) -> None:
        self.job = job
        self.step = job.step
        self.stop = stop
        self.priority = 1 if job.request.lane == "interactive" else 0
        left_s = None if job.deadline is None else job.deadline - jobs.now()
        self.deadline = None if left_s is None else time.monotonic() + left_s
        self.metrics: dict[str, float] = {}
        self.written: dict[str, str] = {}
        self.latest = job
        self._jobs = jobs
        self._store = store
        self._check_lease = check_lease
        self._reported_at = time.monotonic()
        self._untold: tuple[float, str] | None = None

    def read(self, name: str) -> bytes:
        self.check_cancelled()
        return self._store.get(self.step.inputs[name])

    def write(self, name: str, data: bytes, content_type: str = "application/octet-stream") -> None:
        self.check_cancelled()
        self._check_lease()
        stored = self._store.put(self.step.output_key(self.job.id, name), data, content_type=content_type)
        self.written[name] = stored.sha256

    def progress(self, fraction: float, note: str = "") -> None:
        self.check_cancelled()
        self._untold = (fraction, note)
        if time.monotonic() - self._reported_at >= PROGRESS_EVERY_S:
            self.report()

    def report(self) -> None:
        """Pass on the progress that was told last, unless it was passed on. Raises Fenced, JobNotFound."""
        told, self._untold = self._untold, None
        if told is None:
            return
        self._reported_at, token = time.monotonic(), self.job.last_token
        report: Callable[[Job, float], machine.Move] = lambda job, now: machine.report(job, token, *told, now)  # noqa: E731
        self.latest = machine.apply(self._jobs, self.job.id, report, self.latest)
        if self.latest.cancel_requested:
            self.stop.set()

    def measure(self, name: str, value: float) -> None:
        self.metrics[name] = float(value)

    def cancelled(self) -> bool:
        return self.stop.is_set()

    def check_cancelled(self) -> None:
        if self.stop.is_set():
            raise RequestCancelled(f"The work on step {self.step.index} of the job {self.job.id} is no longer wanted.")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise DeadlineExceeded(f"The deadline of the job {self.job.id} passed at its step {self.step.index}.")
