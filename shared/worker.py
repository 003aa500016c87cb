"""The runtime of every worker: takes messages, does one step each, and commits only what is done, in order.

One thread polls, renews leases and commits; each step runs in a thread of its own. A message is done once its step's
artifacts are stored, the job has moved on and the next message is published; until then it stays uncommitted and comes
again after a crash. What a stale worker writes is refused by the job store. Knows nothing about what a step does, or
which adapters it got.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from shared.bus.port import Bus, CommitRefused, Delivery, Partition, Subscription
from shared.errors import TransientError
from shared.execution import Execution, Verdict
from shared.jobs.machine import Fenced
from shared.jobs.port import JobNotFound, JobStore
from shared.retry import RetryPolicy
from shared.schemas.route import LANES, topic_for
from shared.steps import Handler
from shared.store.port import ArtifactStore
from shared.surroundings import Surroundings

log = logging.getLogger(__name__)
COMMIT_EVERY_S = 0.1


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker behaves.

    `slots` steps run at once; up to `waiting_max` more messages wait for a retry or a lease.
    """

    group: str
    name: str = field(default_factory=lambda: f"{socket.gethostname()}-{time.monotonic_ns():x}")
    slots: int = 1
    waiting_max: int = 64
    poll_s: float = 0.25
    watch_s: float = 1.0
    lease_s: float = 30.0
    drain_s: float = 30.0
    abandon_s: float = 5.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    alive_file: Path | None = None


@dataclass(eq=False)
class _Task:
    """One message that is not committed yet."""

    delivery: Delivery
    reader: _Reader
    execution: Execution
    ended: threading.Event
    start_at: float = 0.0
    thread: threading.Thread | None = None
    verdict: Verdict | None = None
    failure: BaseException | None = None
    renewed_at: float = 0.0
    is_lost: bool = False

    def run(self) -> None:
        try:
            self.verdict = self.execution.run()
        except BaseException as failure:
            self.failure = failure
        self.ended.set()


class _Reader:
    """A subscription and the offsets in flight on it; commits a partition as far as it is done without a gap."""

    def __init__(self, bus: Bus, topic: str, group: str, *, urgent: bool) -> None:
        self.tasks: list[_Task] = []
        self._flights: dict[Partition, deque[list[int]]] = {}  # [offset, done?] in order of arrival
        self._paused = False
        self._committed_at = 0.0
        self.subscription: Subscription = bus.subscribe(
            [topic], group, on_assigned=self._assigned, on_revoked=self._revoked, urgent=urgent
        )

    def began(self, delivery: Delivery) -> None:
        self._flights.setdefault(delivery.partition, deque()).append([delivery.offset, 0])

    def finished(self, delivery: Delivery) -> None:
        for flight in self._flights.get(delivery.partition, ()):
            if flight[0] == delivery.offset:
                flight[1] = 1

    def commit(self, *, at_once: bool) -> None:
        """Commit what is done, a few times a second.

        A refusal is no loss: the messages come again and are found done.
        """
        if not at_once and time.monotonic() - self._committed_at < COMMIT_EVERY_S:
            return
        self._committed_at = time.monotonic()
        positions: dict[Partition, int] = {}
        for partition, flights in self._flights.items():
            while flights and flights[0][1]:
                positions[partition] = flights.popleft()[0] + 1
        if positions:
            try:
                self.subscription.commit(positions)
            except CommitRefused as error:
                log.warning("commit of %s refused: %s", positions, error)
            except TransientError as error:
                log.warning("commit of %s put off: %s", positions, error)
                for partition, offset in positions.items():
                    self._flights.setdefault(partition, deque()).appendleft([offset - 1, 1])

    def poll(self, timeout_s: float, count: int, *, paused: bool) -> list[Delivery]:
        """At most `count` new messages; a paused poll only keeps the membership."""
        self._paused = paused
        if paused:
            self.subscription.pause(self.subscription.assignment())
        else:
            self.subscription.resume(self.subscription.assignment())
        return self.subscription.poll(timeout_s, max_records=max(count, 1))

    def _assigned(self, partitions: frozenset[Partition]) -> None:
        if self._paused:
            self.subscription.pause(partitions)

    def _revoked(self, partitions: frozenset[Partition]) -> None:
        for partition in partitions:
            self._flights.pop(partition, None)
        for task in self.tasks:
            if task.delivery.partition in partitions:
                task.is_lost = True
                task.execution.stop.set()


class Worker:
    """Runs one handler against a bus until it is told to stop."""

    def __init__(
        self,
        handler: Handler,
        bus: Bus,
        store: ArtifactStore,
        jobs: JobStore,
        settings: WorkerSettings,
        surroundings: Surroundings | None = None,
    ) -> None:
        self._handler = handler
        self._bus = bus
        self._store = store
        self._jobs = jobs
        self._settings = settings
        self._surroundings = surroundings or Surroundings()
        self._tasks: list[_Task] = []
        self._readers: list[_Reader] = []
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._stopping_since = 0.0
        self._told_alive_at = 0.0

    def run(self) -> None:
        """Work until `stop`, then drain. A crash of a step's thread (not an ordinary error) ends the worker as well."""
        try:
            self._readers = [
                _Reader(
                    self._bus, topic_for(self._handler.kind, lane), self._settings.group, urgent=lane == "interactive"
                )
                for lane in LANES
            ]
            log.info("%s works on %s", self._settings.name, self._handler.kind)
            self._surroundings.await_first()
            while not self._is_drained():
                self._settle()
                self._watch()
                self._start()
                try:
                    self._fetch()
                except TransientError as error:
                    log.warning("no messages for now: %s", error)
                    self._ended.wait(self._settings.watch_s)
                self._tell_alive()
        finally:
            self._surroundings.close()
            for task in self._tasks:
                task.execution.stop.set()
            for reader in self._readers:
                reader.subscription.close()
            log.info("%s stopped", self._settings.name)

    def stop(self) -> None:
        """Take no more messages, let running steps finish for `drain_s`, then hand them back. Returns at once."""
        self._stopping_since = time.monotonic()
        self._stopping.set()

    def stop_on_signals(self) -> None:
        """Stop on SIGTERM and SIGINT. Main thread only."""

        def handle(number: int, _: FrameType | None) -> None:
            log.info("%s: draining", signal.Signals(number).name)
            self.stop()

        signal.signal(signal.SIGTERM, handle)
        signal.signal(signal.SIGINT, handle)

    @property
    def running(self) -> int:
        """How many steps run now."""
        return sum(task.thread is not None for task in self._tasks)

    @property
    def _free(self) -> int:
        return self._settings.slots - self.running

    @property
    def _is_taking(self) -> bool:
        """Whether steps begin now; without, messages are left where they are and the membership is kept."""
        return not self._stopping.is_set() and self._surroundings.are_there

    def _is_drained(self) -> bool:
        if not self._stopping.is_set():
            return False
        waited_s = time.monotonic() - self._stopping_since
        if waited_s > self._settings.drain_s:
            for task in self._tasks:
                task.execution.drain()
        if self.running and waited_s < self._settings.drain_s + self._settings.abandon_s:
            return False
        self._settle()
        return True

    def _settle(self) -> None:
        """Take in what finished, and commit."""
        self._ended.clear()
        for task in [task for task in self._tasks if task.thread is not None and not task.thread.is_alive()]:
            if task.failure is not None:
                raise task.failure
            task.thread = None
            if task.is_lost:
                self._forget(task)
            elif task.verdict is None or task.verdict.is_done:
                task.reader.finished(task.delivery)
                self._forget(task)
            else:
                task.start_at = time.monotonic() + task.verdict.again_in_s
        for task in [task for task in self._tasks if task.is_lost and task.thread is None]:
            self._forget(task)
        for reader in self._readers:
            reader.commit(at_once=self._stopping.is_set())

    def _tell_alive(self) -> None:
        now = time.monotonic()
        if self._settings.alive_file is not None and now - self._told_alive_at >= self._settings.watch_s:
            self._settings.alive_file.touch()
            self._told_alive_at = now

    def _forget(self, task: _Task) -> None:
        self._tasks.remove(task)
        task.reader.tasks.remove(task)

    def _watch(self) -> None:
        """Renew the leases of running steps, pass on their progress, and notice cancelled jobs."""
        now = time.monotonic()
        for task in self._tasks:
            held = task.execution.held
            if task.thread is None or held is None or now - task.renewed_at < self._settings.watch_s:
                continue
            try:
                task.execution.report()
                job = task.execution.keep(held)
            except (Fenced, JobNotFound):
                task.execution.stop.set()
            except TransientError as error:
                log.warning("the lease of %s was not renewed: %s", held.job_id, error)
            else:
                task.renewed_at = now
                if job.cancel_requested:
                    task.execution.stop.set()

    def _start(self) -> None:
        """Start waiting tasks while there are free slots."""
        if not self._is_taking:
            return
        now = time.monotonic()
        for task in self._tasks:
            if self.running >= self._settings.slots:
                return
            if task.thread is None and task.start_at <= now:
                task.renewed_at = now
                task.thread = threading.Thread(target=task.run, name=f"{self._handler.kind}-step", daemon=True)
                task.thread.start()

    def _fetch(self) -> None:
        """Poll every lane, interactive first; only while a slot is free does it take a message."""
        poll_s = self._next_wait_s()
        for reader in self._readers:
            is_full = self.running >= self._settings.slots or len(self._tasks) >= self._settings.waiting_max
            paused = not self._is_taking or is_full
            self._take(reader, reader.poll(0.0, self._free, paused=paused))
        if self.running < self._settings.slots and not self._stopping.is_set():
            paused = not self._is_taking or len(self._tasks) >= self._settings.waiting_max
            self._take(self._readers[0], self._readers[0].poll(poll_s, self._free, paused=paused))
        else:
            self._ended.wait(poll_s)

    def _next_wait_s(self) -> float:
        now = time.monotonic()
        waits = [max(task.start_at - now, 0.0) for task in self._tasks if task.thread is None]
        full = self.running >= self._settings.slots or not self._is_taking
        running = [0.02] if self.running and not full else []
        return min([self._settings.poll_s, *([] if full else waits), *running])

    def _take(self, reader: _Reader, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            execution = Execution(
                delivery, self._handler, self._bus, self._store, self._jobs, self._settings, self._surroundings
            )
            task = _Task(delivery, reader, execution, self._ended)
            reader.began(delivery)
            reader.tasks.append(task)
            self._tasks.append(task)
        self._start()
