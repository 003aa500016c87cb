"""A whole system without models, for tests of what it promises: workers with handlers that do as the test says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from shared.bus.memory import MemoryBus
from shared.jobs import machine
from shared.jobs.port import JobStore
from shared.publishing import publish_step
from shared.retry import RetryPolicy
from shared.schemas import Edit, Job, JobRequest, StepKind
from shared.steps import StepContext
from shared.store.folder import FolderStore
from shared.surroundings import Surroundings
from shared.worker import Worker, WorkerSettings

FAST = WorkerSettings(
    group="test",
    poll_s=0.02,
    watch_s=0.05,
    lease_s=0.6,
    drain_s=2.0,
    abandon_s=0.2,
    retry=RetryPolicy(attempts_max=3, base_s=0.02, max_s=0.05),
)
PATIENCE_S = 15.0


class Crash(BaseException):
    """The process dies here."""


@dataclass
class FakeHandler:
    """Writes one artifact, after whatever `act` does."""

    kind: StepKind = "tokenize"
    act: Callable[[StepContext], None] = lambda step: None
    runs: list[str] = field(default_factory=list)

    def run(self, step: StepContext) -> None:
        self.runs.append(step.job.id)
        self.act(step)
        step.write("out", f"{step.job.id} step {step.step.index}".encode())


@dataclass
class World:
    """An embedded system without models."""

    bus: MemoryBus
    store: FolderStore
    jobs: JobStore
    workers: list[tuple[Worker, threading.Thread]] = field(default_factory=list)
    crashes: list[BaseException] = field(default_factory=list)

    def work(
        self,
        handler: FakeHandler,
        bus: MemoryBus | None = None,
        surroundings: Surroundings | None = None,
        **changes: object,
    ) -> Worker:
        settings = replace(FAST, name=f"worker-{len(self.workers)}", **changes)  # type: ignore[arg-type]
        worker = Worker(handler, bus or self.bus, self.store, self.jobs, settings, surroundings)

        def run() -> None:
            try:
                worker.run()
            except BaseException as crash:
                self.crashes.append(crash)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.workers.append((worker, thread))
        return worker

    def submit(self, **changes: object) -> Job:
        asked = JobRequest.model_validate({"edit": Edit(type="denoise"), **changes})
        accepted = machine.accept(asked, self.jobs.now())
        job = self.jobs.create(accepted.job, accepted.events).job
        return publish_step(self.bus, self.jobs, job)

    def wait(self, job: Job, until: Callable[[Job], bool]) -> Job:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if until(now := self.jobs.get(job.id)):
                return now
            time.sleep(0.01)
        raise AssertionError(f"still {now.state} at step {now.step_index}: {now.error}")

    def wait_end(self, job: Job) -> Job:
        return self.wait(job, lambda job: job.is_terminal)

    def dead_letters(self, topic: str) -> list[dict[str, str]]:
        reader = self.bus.subscribe([topic], "letters")
        found = reader.poll(0.2, max_records=100)
        reader.close()
        return [{name: value.decode() for name, value in record.headers} for record in found]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
