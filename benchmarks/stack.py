"""What the system costs, all figures by one command: `python -m benchmarks.stack`, or some `--parts` of them.

    embedded   jobs per second and added latency with null models in one process, at 1, 2 and 4 workers per service
    stack      the same on the local stack
    memory     what the stack's processes hold after each tenth of 10,000 null jobs
    nano       audio seconds per second and time to first audio of speech (`benchmarks.speech`)

Latency is from submission to the job's end; idle is one job at a time, saturated is `--jobs` at once. No measurement
takes jobs for longer than `--seconds`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.speech import at, speech
from editx.stack.null import factories, handlers
from editx.stack.stack import ORDER, Options, Stack
from shared.audio.io import Waveform, write_audio
from shared.bus.memory import MemoryBus
from shared.bus.port import Bus, Subscription
from shared.inference.local import LocalInference
from shared.intake import Intake
from shared.jobs.memory import MemoryJobStore
from shared.schemas import Edit, JobRequest
from shared.schemas.exchange import RESULTS, Result, Submission
from shared.store.folder import FolderStore
from shared.worker import Worker, WorkerSettings

SERVICES = ("tokenizer", "llm", "decoder")
PARTS = ("embedded", "stack", "memory", "nano")


class Driver:
    """Submits null jobs in process, as the gateway does, and takes their ends from the topic of results."""

    def __init__(self, intake: Intake, bus: Bus) -> None:
        self._intake = intake
        self._reader: Subscription = bus.subscribe([RESULTS], f"benchmark-{time.time_ns()}")
        self._ended: dict[str, float] = {}
        self._number = 0
        samples = np.random.default_rng(0).normal(0, 0.1, 1_600).astype(np.float32)
        self._audio = write_audio(Waveform(samples, 16_000), None, "wav") or b""

    def submit(self) -> tuple[str, float]:
        """A job's id and when it was submitted."""
        self._number += 1
        submission = Submission.model_construct(
            schema_version=1, submission_id=f"{time.time_ns()}-{self._number}", owner="benchmark",
            request=JobRequest(edit=Edit(type="denoise")), audio=self._audio,
        )  # fmt: skip
        began = time.perf_counter()
        return self._intake.accept(submission).id, began

    def wait(self, ids: set[str], patience_s: float = 120.0) -> None:
        """Return when all these jobs have ended."""
        until = time.perf_counter() + patience_s
        while ids - self._ended.keys():
            if time.perf_counter() > until:
                raise TimeoutError(f"{len(ids - self._ended.keys())} of {len(ids)} jobs did not end")
            self._collect()

    def _collect(self) -> None:
        for record in self._reader.poll(0.05, max_records=500):
            result = Result.model_validate_json(record.value)
            self._ended.setdefault(result.job_id, time.perf_counter())

    def idle_s(self, count: int, seconds: float) -> list[float]:
        """Latencies of jobs one after the other, at most `count` and for at most `seconds`."""
        latencies: list[float] = []
        until = time.perf_counter() + seconds
        while len(latencies) < count and time.perf_counter() < until:
            job_id, began = self.submit()
            self.wait({job_id})
            latencies.append(self._ended[job_id] - began)
        return latencies

    def saturated(self, count: int, seconds: float, threads: int = 4) -> tuple[float, list[float]]:
        """Jobs per second, and the latencies of jobs that are submitted as fast as possible."""
        submitted: list[tuple[str, float]] = []
        began = time.perf_counter()

        def submit() -> None:
            for _ in range(count // threads):
                if time.perf_counter() - began > seconds:
                    return
                submitted.append(self.submit())

        pool = [threading.Thread(target=submit) for _ in range(threads)]
        for thread in pool:
            thread.start()
        while any(thread.is_alive() for thread in pool):
            self._collect()
        self.wait({job_id for job_id, _ in submitted})
        took_s = max(self._ended.values()) - began
        return len(submitted) / took_s, [self._ended[job_id] - at for job_id, at in submitted]

    def pour(self, count: int, seconds: float, at_once: int = 100) -> int:
        """Put jobs through, `at_once` at a time, at most `count` and for at most `seconds`; how many."""
        until, done = time.perf_counter() + seconds, 0
        while done < count and time.perf_counter() < until:
            batch = {self.submit()[0] for _ in range(min(at_once, count - done))}
            self.wait(batch)
            done += len(batch)
        return done


@contextmanager
def embedded(workers: int, folder: Path) -> Iterator[Driver]:
    """The embedded shape's ports with null models and some workers per service."""
    bus, store, jobs = MemoryBus(), FolderStore(folder), MemoryJobStore()
    inference = LocalInference(factories(), concurrent=SERVICES)
    running: list[tuple[Worker, threading.Thread]] = []
    for number in range(workers):
        for service in SERVICES:
            settings = WorkerSettings(group=f"editx-{service}", name=f"{service}-{number}", slots=4, poll_s=0.1)
            worker = Worker(handlers(inference)[service], bus, store, jobs, settings)
            running.append((worker, threading.Thread(target=worker.run, daemon=True)))
            running[-1][1].start()
    try:
        yield Driver(Intake(bus, store, jobs), bus)
    finally:
        for worker, _ in running:
            worker.stop()
        for _, thread in running:
            thread.join(timeout=10.0)
        inference.close()


@contextmanager
def local_stack(workers: int, folder: Path, *, port: int, storage: str) -> Iterator[tuple[Driver, Stack]]:
    """The local stack with null models inside the workers."""
    options = Options(port=port, inference="null", services=SERVICES, workers=workers, slots=4, gateway=False,
                      broker_storage="memory" if storage == "memory" else "store")  # fmt: skip
    stack = Stack(folder, options)
    try:
        stack.up()
        bus, jobs = stack.bus(), stack.jobs()
        yield Driver(Intake(bus, stack.store(), jobs), bus), stack
        bus.close()
        jobs.close()
    finally:
        stack.down()


def measure(name: str, driver: Driver, workers: int, jobs: int, seconds: float) -> None:
    """Print one line of the table."""
    driver.wait({driver.submit()[0] for _ in range(8)})
    idle = sorted(driver.idle_s(100, seconds))
    rate, latencies = driver.saturated(jobs, seconds)
    busy = sorted(latencies)
    print(
        f"{name:<22} {workers:>7} {statistics.median(idle) * 1e3:>9.1f} {at(idle, 0.99) * 1e3:>9.1f}"
        f" {rate:>8.1f} {statistics.median(busy) * 1e3:>9.0f} {at(busy, 0.99) * 1e3:>9.0f}",
        flush=True,
    )


def resident_mib(stack: Stack) -> dict[str, float]:
    """The memory that every process of ours holds now."""
    page = os.sysconf("SC_PAGE_SIZE") / 2**20
    ours = {name: pid for name, pid in stack.pids().items() if name not in ORDER}
    return {name: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for name, pid in ours.items()}


def memory(stack: Stack, driver: Driver, jobs: int, seconds: float) -> None:
    """Print what every process holds after each tenth of `jobs`."""
    total, names = 0, list(resident_mib(stack))
    print("    jobs " + "".join(f"{name:>13}" for name in names) + "   MiB")
    for _ in range(10):
        total += driver.pour(jobs // 10, seconds / 10)
        print(f"{total:>8} " + "".join(f"{mib:>13.1f}" for mib in resident_mib(stack).values()), flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="of each service")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16], help="calls at once of the part nano")
    parser.add_argument("--jobs", type=int, default=400, help="submitted at once")
    parser.add_argument("--memory-jobs", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=120.0, help="the most that one measurement takes jobs for")
    parser.add_argument("--port", type=int, default=18_300)
    parser.add_argument("--broker", choices=["store", "memory"], default="store", help="where the broker keeps records")
    given = parser.parse_args()
    if {"embedded", "stack"} & set(given.parts):
        print("                                  idle, ms              saturated")
        print("shape                  workers       p50       p99   jobs/s    p50 ms    p99 ms")
    for workers in given.workers if "embedded" in given.parts else []:
        with tempfile.TemporaryDirectory() as folder, embedded(workers, Path(folder)) as driver:
            measure("embedded", driver, workers, given.jobs, given.seconds)
    for workers in given.workers if "stack" in given.parts else []:
        with (
            tempfile.TemporaryDirectory() as folder,
            local_stack(workers, Path(folder), port=given.port, storage=given.broker) as (driver, _),
        ):
            measure(f"stack, broker: {given.broker}", driver, workers, given.jobs, given.seconds)
    if "memory" in given.parts:
        with (
            tempfile.TemporaryDirectory() as folder,
            local_stack(1, Path(folder), port=given.port, storage=given.broker) as (driver, stack),
        ):
            memory(stack, driver, given.memory_jobs, given.seconds * 10)
    if "nano" in given.parts:
        speech(given.concurrency, given.seconds, given.port)


if __name__ == "__main__":
    main()
