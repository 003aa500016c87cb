"""What the whole promises, under a storm: no accepted job is lost, each ends once, and every effect happens once.

Workers crash, stall past their leases, meet errors that pass and errors that stay, get duplicates, and are cancelled
at random. Then the faults stop, everything drains, and the records are checked.
"""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from shared.bus.memory import MemoryBus
from shared.errors import PermanentError, TransientError
from shared.jobs import machine
from shared.jobs.machine import JobClosed
from shared.jobs.memory import MemoryJobStore
from shared.jobs.port import JobStore
from shared.jobs.sqlite import SqliteJobStore
from shared.publishing import publish_step
from shared.schemas import Job, JobState, StepKind
from shared.schemas.route import DLQ_FAILED
from shared.steps import StepContext
from shared.store.folder import FolderStore
from shared.sweeper import Sweeper
from tests.shared.worlds import Crash, FakeHandler, World

KINDS: tuple[StepKind, ...] = ("tokenize", "generate", "decode")
STORM_S = 3.0


class Storm:
    """Faults at random until it is over."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.over = threading.Event()

    def strike(self, step: StepContext) -> None:
        """What may happen to one attempt at a step."""
        chance = 1.0 if self.over.is_set() else self.random.random()
        if chance < 0.05:
            raise Crash
        if chance < 0.10:
            time.sleep(0.5)  # longer than the lease of a worker that does not renew
        elif chance < 0.25:
            raise TransientError("away for now")
        elif chance < 0.27:
            raise PermanentError("damaged")
        else:
            time.sleep(0.01)
        step.check_cancelled()


def keep_workers(world: World, storm: Storm) -> None:
    """Two workers per kind, one of which never renews its lease; whoever died is replaced."""
    for kind in KINDS:
        for number in range(2):
            watch_s = 1000.0 if number and not storm.over.is_set() else 0.05
            world.work(FakeHandler(kind, storm.strike), slots=2, lease_s=0.4, watch_s=watch_s)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("durable", [False, True])
def test_every_accepted_job_ends_once_and_its_effects_happen_once(tmp_path: Path, seed: int, durable: bool) -> None:
    jobs: JobStore = SqliteJobStore(tmp_path / "jobs.sqlite") if durable else MemoryJobStore()
    world, storm = World(MemoryBus(), FolderStore(tmp_path / "store"), jobs), Storm(seed)
    keep_workers(world, storm)
    accepted: list[Job] = []
    began = time.monotonic()
    while time.monotonic() - began < STORM_S:
        accepted += [world.submit() for _ in range(storm.random.randrange(4))]
        time.sleep(0.05)
        if not accepted:
            continue
        job = jobs.get(storm.random.choice(accepted[-4:]).id)
        if storm.random.random() < 0.2 and not job.is_terminal:
            publish_step(world.bus, jobs, job)  # a duplicate
        if storm.random.random() < 0.2:
            cancel(jobs, job)
        if len(world.crashes) > 2 * (len(world.workers) // 6):
            keep_workers(world, storm)
    for job in [world.submit() for _ in range(5)]:  # a slow machine may have drawn none above
        cancel(jobs, job)
        accepted.append(job)
    storm.over.set()
    keep_workers(world, storm)
    Sweeper(jobs, world.bus, world.store).sweep(everything=True)
    ended = [world.wait_end(job) for job in accepted]
    for worker, _ in world.workers:
        worker.stop()
    for _, thread in world.workers:
        thread.join(timeout=10)
    assert all(isinstance(crash, Crash) for crash in world.crashes)
    failed = {letter["job-id"] for letter in world.dead_letters(DLQ_FAILED)}
    for job in ended:
        check(world, job)
    assert failed <= {job.id for job in ended if job.state == JobState.FAILED}
    assert {JobState.DONE, JobState.CANCELLED} <= {job.state for job in ended}
    assert world.crashes
    assert jobs.due(float("inf")) == []
    jobs.close()


def cancel(jobs: JobStore, job: Job) -> None:
    try:
        machine.apply(jobs, job.id, machine.request_cancel)
    except JobClosed:
        return


def check(world: World, job: Job) -> None:
    """A job's record, events and artifacts tell one and the same story."""
    events = world.jobs.events(job.id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.type for event in events if event.is_last] == [str(job.state)]
    assert [event.step_index for event in events] == sorted(event.step_index for event in events)
    assert [event.step_index for event in events if event.type == "step"] == list(range(job.step_index))
    assert [timing.index for timing in job.timings] == list(range(job.step_index))
    for step in job.route.steps[: job.step_index]:
        assert world.store.get(step.output_key(job.id, "out")) == f"{job.id} step {step.index}".encode()
    if job.state == JobState.DONE:
        assert job.step_index == len(job.route)
        keys = [info.key for info in world.store.list(f"jobs/{job.id}/")]
        assert keys == [step.output_key(job.id, "out") for step in job.route.steps]
    if job.state == JobState.FAILED:
        assert job.error is not None
