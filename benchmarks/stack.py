"""What the system costs besides the models: jobs per second and added latency with null models.

`python -m benchmarks.stack` measures the embedded shape and the local stack at 1, 2 and 4 workers per service. Latency
is from submission to the job's end; idle is one job at a time, saturated is `--jobs` at once. Knows nothing of models.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from editx.stack.null import factories, handlers
from editx.stack.stack import Options, Stack
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

    def idle_s(self, count: int) -> list[float]:
        """Latencies of jobs one after the other."""
        latencies = []
        for _ in range(count):
            job_id, began = self.submit()
            self.wait({job_id})
            latencies.append(self._ended[job_id] - began)
        return latencies

    def saturated(self, count: int, threads: int = 4) -> tuple[float, list[float]]:
        """Jobs per second, and the latencies of jobs that are submitted as fast as possible."""
        submitted: list[tuple[str, float]] = []

        def submit() -> None:
            for _ in range(count // threads):
                submitted.append(self.submit())

        began = time.perf_counter()
        pool = [threading.Thread(target=submit) for _ in range(threads)]
        for thread in pool:
            thread.start()
        while any(thread.is_alive() for thread in pool):
            self._collect()
        self.wait({job_id for job_id, _ in submitted})
        seconds = max(self._ended.values()) - began
        return len(submitted) / seconds, [self._ended[job_id] - at for job_id, at in submitted]


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
def local_stack(workers: int, folder: Path, *, port: int, storage: str) -> Iterator[Driver]:
    """The local stack with null models inside the workers."""
    options = Options(port=port, inference="null", services=SERVICES, workers=workers, slots=4, gateway=False,
                      broker_storage="memory" if storage == "memory" else "store")  # fmt: skip
    stack = Stack(folder, options)
    try:
        stack.up()
        bus, jobs = stack.bus(), stack.jobs()
        yield Driver(Intake(bus, stack.store(), jobs), bus)
        bus.close()
        jobs.close()
    finally:
        stack.down()


def measure(name: str, opened: Callable[[], object], workers: int, jobs: int) -> None:
    """Print one line of the table."""
    with opened() as driver:  # type: ignore[attr-defined]
        driver.wait({driver.submit()[0] for _ in range(8)})
        idle = sorted(driver.idle_s(30))
        rate, latencies = driver.saturated(jobs)
    busy = sorted(latencies)
    print(
        f"{name:<22} {workers:>7} {statistics.median(idle) * 1e3:>9.1f} {idle[-1] * 1e3:>9.1f}"
        f" {rate:>8.1f} {statistics.median(busy) * 1e3:>9.0f} {busy[int(len(busy) * 0.99) - 1] * 1e3:>9.0f}",
        flush=True,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Jobs per second and added latency with null models.")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--jobs", type=int, default=400)
    parser.add_argument("--port", type=int, default=18_300)
    parser.add_argument("--broker", choices=["store", "memory"], default="store", help="where the broker keeps records")
    arguments = parser.parse_args()
    print("                                  idle, ms              saturated")
    print("shape                  workers       p50       max   jobs/s    p50 ms    p99 ms")
    for workers in arguments.workers:
        with tempfile.TemporaryDirectory() as folder:
            measure("embedded", lambda: embedded(workers, Path(folder)), workers, arguments.jobs)  # noqa: B023
    for workers in arguments.workers:
        with tempfile.TemporaryDirectory() as folder:
            stack = lambda: local_stack(workers, Path(folder), port=arguments.port, storage=arguments.broker)  # noqa: B023, E731
            measure(f"stack, broker: {arguments.broker}", stack, workers, arguments.jobs)


if __name__ == "__main__":
    main()
