"""The worker's promises: nothing is lost, effects happen once, poison goes aside, cancel and drain are honoured."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from shared.bus.memory import MemoryBus
from shared.bus.port import BusUnavailable, Delivery, Headers, ListenerFailed, Partition, Subscription
from shared.deadletters import dead_letters, replay
from shared.errors import PermanentError, TransientError, UserError
from shared.inference.port import DeadlineExceeded, InferenceUnavailable, RequestCancelled, UnknownModel
from shared.jobs import machine
from shared.jobs.machine import Fenced
from shared.jobs.memory import MemoryJobStore
from shared.outbox import recall
from shared.publishing import publish_step
from shared.schemas import Edit, Job, JobRequest, JobState, LeaseState, StepKind, topic_for
from shared.schemas.route import DLQ_FAILED, DLQ_UNREADABLE
from shared.steps import StepContext
from shared.store.folder import FolderStore
from shared.surroundings import Surroundings
from shared.sweeper import Sweeper
from tests.shared.worlds import PATIENCE_S, Crash, FakeHandler, World, until


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(MemoryBus(), FolderStore(tmp_path / "store"), MemoryJobStore())
    yield world
    for worker, _ in world.workers:
        worker.stop()
    for _, thread in world.workers:
        thread.join(timeout=10)
        assert not thread.is_alive()


def at_step(index: int) -> Callable[[Job], bool]:
    return lambda job: job.step_index >= index


def test_a_job_goes_through_the_workers_of_its_route_to_its_end(world: World) -> None:
    kinds: tuple[StepKind, ...] = ("tokenize", "generate", "decode")
    for kind in kinds:
        world.work(FakeHandler(kind))
    job = world.wait_end(world.submit(iterations=2))
    assert job.state == JobState.DONE
    assert [timing.kind for timing in job.timings] == list(kinds) * 2
    keys = [info.key for info in world.store.list(f"jobs/{job.id}/")]
    assert keys == [f"jobs/{job.id}/{index}-{kind}/out" for index, kind in enumerate(kinds * 2)]
    assert [event.type for event in world.jobs.events(job.id)] == ["accepted", *["started", "step"] * 6, "done"]


def test_a_worker_that_dies_before_its_commit_loses_nothing_and_repeats_nothing(world: World) -> None:
    class DyingBus(MemoryBus):
        """Takes the message of the next step, then the process dies: the job has moved on, nothing is committed."""

        def publish(self, topic: str, key: str, value: bytes, headers: Headers = ()) -> None:
            world.bus.publish(topic, key, value, headers)
            raise Crash

    dying = DyingBus()
    dying.subscribe = world.bus.subscribe  # type: ignore[method-assign]
    first, second = FakeHandler(), FakeHandler()
    job = world.submit()
    world.work(first, dying)
    until(lambda: world.crashes)
    world.work(second)
    for kind in ("generate", "decode"):
        world.work(FakeHandler(kind))
    assert world.wait_end(job).state == JobState.DONE
    assert first.runs == [job.id]
    assert second.runs == []
    until(lambda: world.bus.backlog(topic_for("tokenize", "interactive"), "test") == 0)


def test_a_worker_that_dies_between_state_and_message_has_the_message_sent_by_its_successor(world: World) -> None:
    class MuteBus(MemoryBus):
        def publish(self, topic: str, key: str, value: bytes, headers: Headers = ()) -> None:
            raise Crash

    mute = MuteBus()
    mute.subscribe = world.bus.subscribe  # type: ignore[method-assign]
    job = world.submit()
    world.work(FakeHandler(), mute)
    until(lambda: world.crashes)
    assert world.jobs.get(job.id).step_index == 1
    assert world.jobs.get(job.id).dispatched == 0
    again = FakeHandler()
    world.work(again)
    for kind in ("generate", "decode"):
        world.work(FakeHandler(kind))
    assert world.wait_end(job).state == JobState.DONE
    assert again.runs == []


def test_a_step_whose_worker_died_in_the_middle_is_done_again_once_its_lease_ran_out(world: World) -> None:
    def die(step: StepContext) -> None:
        raise Crash

    job = world.submit()
    world.work(FakeHandler(act=die))
    until(lambda: world.crashes)
    handler = FakeHandler()
    world.work(handler)
    moved = world.wait(job, at_step(1))
    assert handler.runs == [job.id]
    assert moved.timings[0].attempts == 2


def test_a_step_that_kills_every_worker_ends_in_the_dead_letters(world: World) -> None:
    def die(step: StepContext) -> None:
        raise Crash

    def died_or_ended(before: int) -> bool:
        return len(world.crashes) > before or world.jobs.get(job.id).is_terminal

    job = world.submit()
    while not world.jobs.get(job.id).is_terminal:
        before = len(world.crashes)
        world.work(FakeHandler(act=die))
        until(partial(died_or_ended, before))
    ended = world.jobs.get(job.id)
    assert ended.state == JobState.FAILED
    assert ended.error is not None
    assert ended.error.code == "attempts_exhausted"
    [letter] = world.dead_letters(DLQ_FAILED)
    assert (letter["x-editx-code"], letter["attempt"]) == ("attempts_exhausted", "3")


def test_a_worker_that_lost_its_lease_cannot_write_the_jobs_state(world: World) -> None:
    """The first worker sleeps through its lease, as a paused process would; the second one's result stands."""
    slept, woke = threading.Event(), threading.Event()

    def sleep(step: StepContext) -> None:
        slept.set()
        woke.wait(PATIENCE_S)

    job = world.submit()
    world.work(FakeHandler(act=sleep), lease_s=0.2, watch_s=1000.0, group="first")
    slept.wait(PATIENCE_S)
    other = FakeHandler()
    world.work(other, group="second")
    moved = world.wait(job, at_step(1))
    woke.set()
    time.sleep(0.3)
    now = world.jobs.get(job.id)
    assert other.runs == [job.id]
    assert (now.step_index, now.last_token, now.timings) == (1, moved.last_token, moved.timings)


def test_a_worker_that_lost_its_lease_cannot_write_artifacts(world: World) -> None:
    """The first worker sleeps through its lease and then wants to write; the second one's artifact stands."""
    slept, woke, refused = threading.Event(), threading.Event(), threading.Event()

    def sleep(step: StepContext) -> None:
        slept.set()
        woke.wait(PATIENCE_S)
        try:
            step.write("out", b"stale")
        except Fenced:
            refused.set()
            raise

    job = world.submit()
    world.work(FakeHandler(act=sleep), lease_s=0.2, watch_s=1000.0, group="first")
    slept.wait(PATIENCE_S)
    world.work(FakeHandler(), group="second")
    moved = world.wait(job, at_step(1))
    woke.set()
    until(refused.is_set)
    kept = world.store.get(f"jobs/{job.id}/0-tokenize/out")
    assert kept == f"{job.id} step 0".encode()
    assert moved.timings[0].artifacts == {"out": hashlib.sha256(kept).hexdigest()}


def test_a_worker_notices_between_two_writes_that_its_lease_is_gone(world: World) -> None:
    stopped = threading.Event()

    def wait_to_be_stopped(step: StepContext) -> None:
        until(step.cancelled)
        stopped.set()
        step.check_cancelled()

    job = world.submit()
    world.work(FakeHandler(act=wait_to_be_stopped), lease_s=1000.0)
    world.wait(job, lambda job: job.lease is not None)
    taken = world.jobs.get(job.id)
    world.jobs.replace(
        taken.model_copy(update={"last_token": 9, "lease": LeaseState(owner="x", token=9, expires_at=0)})
    )
    until(stopped.is_set)


def test_an_outage_of_the_models_costs_no_attempt_however_long_it_is(world: World) -> None:
    """The model server goes away in the middle of a step, for longer than all attempts together would take."""
    there = threading.Event()
    there.set()

    def infer(step: StepContext) -> None:
        if len(handler.runs) == 1:
            there.clear()
        if not there.is_set():
            raise InferenceUnavailable("The model server is away.")

    handler = FakeHandler(act=infer)
    first, second = world.submit(), world.submit()
    world.work(handler, surroundings=Surroundings(there.is_set, every_s=0.01))
    until(lambda: handler.runs)
    time.sleep(1.5)
    assert len(handler.runs) == 1, "steps began although the models were away"
    assert world.jobs.get(handler.runs[0]).attempts == 0
    there.set()
    assert [world.wait(job, at_step(1)).timings[0].attempts for job in (first, second)] == [1, 1]
    assert world.dead_letters(DLQ_FAILED) == []


def test_a_worker_takes_nothing_before_its_models_are_there(world: World) -> None:
    there, handler = threading.Event(), FakeHandler()
    job = world.submit()
    world.work(handler, surroundings=Surroundings(there.is_set, every_s=0.01))
    time.sleep(0.3)
    assert handler.runs == []
    there.set()
    world.wait(job, at_step(1))


def test_a_step_that_takes_its_model_server_down_every_time_ends(world: World) -> None:
    """The server is there again after each crash, so only the number of crashes tells."""

    def crash(step: StepContext) -> None:
        down.set()
        raise InferenceUnavailable("The model server is away.")

    down = threading.Event()

    def answer() -> bool:
        was_down = down.is_set()
        down.clear()
        return not was_down

    handler = FakeHandler(act=crash)
    job = world.submit()
    world.work(handler, surroundings=Surroundings(answer, every_s=0.01))
    ended = world.wait_end(job)
    assert (ended.state, len(handler.runs)) == (JobState.FAILED, 3 + 3)
    [letter] = world.dead_letters(DLQ_FAILED)
    assert letter["attempt"] == "3"


def test_models_that_never_come_back_end_jobs_with_the_reason(world: World) -> None:
    def fail(step: StepContext) -> None:
        raise UnknownModel("No model 'tokenizer' is served here.")

    job = world.submit()
    world.work(FakeHandler(act=fail), surroundings=Surroundings(lambda: False, patience_s=0.2, every_s=0.01))
    ended = world.wait_end(job)
    assert ended.error is not None
    assert ended.error.code == "unknown_model"


@pytest.mark.parametrize("timeout_s", [None, 1000.0])
@pytest.mark.parametrize("error", [RequestCancelled("The request was cancelled."), DeadlineExceeded("Too late.")])
def test_a_model_server_that_breaks_a_call_off_by_itself_has_it_tried_again(
    world: World, error: Exception, timeout_s: float | None
) -> None:
    def break_off_once(step: StepContext) -> None:
        if len(handler.runs) == 1:
            raise error

    handler = FakeHandler(act=break_off_once)
    job = world.submit(timeout_s=timeout_s)
    world.work(handler)
    assert world.wait(job, at_step(1)).timings[0].attempts == 2


def test_a_worker_that_works_long_keeps_its_lease(world: World) -> None:
    job = world.submit()
    handler = FakeHandler(act=lambda step: time.sleep(1.0))
    world.work(handler, lease_s=0.3, group="first")
    other = FakeHandler()
    world.work(other, lease_s=0.3, group="second")
    moved = world.wait(job, at_step(1))
    assert len(handler.runs) + len(other.runs) == 1
    assert moved.timings[0].attempts == 1


def test_an_error_that_may_pass_is_tried_again_after_a_wait(world: World) -> None:
    handler = FakeHandler()

    def fail_twice(step: StepContext) -> None:
        if len(handler.runs) < 3:
            raise TransientError("The model server is away.")

    handler.act = fail_twice
    job = world.submit()
    world.work(handler)
    moved = world.wait(job, at_step(1))
    assert moved.timings[0].attempts == 3
    assert moved.error is None
    retries = [event for event in world.jobs.events(job.id) if event.type == "retry"]
    assert [event.data["code"] for event in retries] == ["temporarily_unavailable"] * 2


@pytest.mark.parametrize(
    ("error", "runs", "code", "letters"),
    [
        (TransientError("The model server is away."), 3, "temporarily_unavailable", 1),
        (PermanentError("The artifact is damaged."), 1, "step_failed", 1),
        (ValueError("nobody foresaw this"), 2, "internal_error", 1),
        (UserError("The recording is silent.", "Record it again.", "audio_silent"), 1, "audio_silent", 0),
    ],
)
def test_an_error_that_stays_ends_the_job_by_its_class(
    world: World, error: Exception, runs: int, code: str, letters: int
) -> None:
    def fail(step: StepContext) -> None:
        raise error

    handler = FakeHandler(act=fail)
    job = world.submit()
    world.work(handler)
    ended = world.wait_end(job)
    assert (ended.state, len(handler.runs)) == (JobState.FAILED, runs)
    assert ended.error is not None
    assert ended.error.code == code
    found = world.dead_letters(DLQ_FAILED)
    assert [letter["x-editx-code"] for letter in found] == [code] * letters
    assert [(letter["job-id"], letter["attempt"]) for letter in found] == [(job.id, str(runs))] * letters


@pytest.mark.parametrize("value", [b"", b"\xff\x00", b"{}", b'{"schema_version": 2, "job_id": "a", "step_index": 0}'])
def test_a_message_that_cannot_be_read_is_put_aside_and_holds_nobody_up(world: World, value: bytes) -> None:
    topic = topic_for("tokenize", "interactive")
    job = world.submit()
    world.bus.publish(topic, job.id, value, (("traceparent", b"00-x"),))
    world.work(FakeHandler())
    until(lambda: world.bus.backlog(topic, "test") == 0)
    [letter] = world.dead_letters(DLQ_UNREADABLE)
    assert letter["x-editx-code"] == "unreadable_message"
    assert letter["traceparent"] == "00-x"
    assert topic in letter["x-editx-origin"]
    assert world.jobs.get(job.id).step_index == 1


def test_a_worker_whose_listener_fails_ends_and_another_one_takes_its_partitions(world: World) -> None:
    real = world.bus.subscribe

    def defect(_: frozenset[Partition]) -> None:
        raise ValueError("a defect")

    world.bus.subscribe = lambda *args, **how: real(*args, **{**how, "on_assigned": defect})  # type: ignore[method-assign]
    world.work(FakeHandler())
    until(lambda: world.crashes)
    assert isinstance(world.crashes[0], ListenerFailed)
    world.bus.subscribe = real  # type: ignore[method-assign]
    job = world.submit()
    world.work(FakeHandler())
    world.wait(job, at_step(1))


def test_a_step_that_was_given_up_is_played_again_as_one_new_job(world: World) -> None:
    def fail(step: StepContext) -> None:
        if step.job.id == job.id:
            raise PermanentError("The artifact is damaged.")

    job = world.submit(webhook_url="https://example.org/hook")
    for kind in ("tokenize", "generate", "decode"):
        world.work(FakeHandler(kind, fail))
    world.wait_end(job)
    [letter] = [one for one in dead_letters(world.bus, quiet_s=0.3) if one.delivery.topic == DLQ_FAILED]
    again = replay(letter, world.bus, world.jobs, world.store)
    assert again is not None
    assert again.request.source_key == f"jobs/{job.id}/source/audio"
    assert recall(world.store, again.id)[0] == 0
    assert world.wait_end(again).state == JobState.DONE
    once_more = replay(letter, world.bus, world.jobs, world.store)
    assert once_more is not None
    assert once_more.id == again.id


def test_a_message_about_an_unknown_job_is_put_aside(world: World) -> None:
    job = world.submit()
    machine.apply(world.jobs, job.id, machine.request_cancel)
    gone = job.model_copy(update={"expires_at": 0.0})
    world.jobs.replace(gone.model_copy(update={"version": world.jobs.get(job.id).version, "state": JobState.CANCELLED}))
    world.jobs.purge(world.jobs.now())
    world.work(FakeHandler())
    until(lambda: world.bus.backlog(topic_for("tokenize", "interactive"), "test") == 0)
    assert [letter["x-editx-code"] for letter in world.dead_letters(DLQ_UNREADABLE)] == ["job_not_found"]


def test_a_duplicate_message_has_no_effect(world: World) -> None:
    job = world.submit()
    for _ in range(3):
        publish_step(world.bus, world.jobs, world.jobs.get(job.id))
    handlers = [FakeHandler(kind) for kind in ("tokenize", "generate", "decode")]
    for handler in handlers:
        world.work(handler)
    assert world.wait_end(job).state == JobState.DONE
    until(lambda: world.bus.backlog(topic_for("tokenize", "interactive"), "test") == 0)
    assert [len(handler.runs) for handler in handlers] == [1, 1, 1]


def test_a_cancelled_job_stops_its_running_step_soon(world: World) -> None:
    def work_for_long(step: StepContext) -> None:
        for _ in range(2000):
            step.check_cancelled()
            time.sleep(0.01)

    job = world.submit()
    world.work(FakeHandler(act=work_for_long))
    world.wait(job, lambda job: job.lease is not None)
    began = time.monotonic()
    asked = machine.apply(world.jobs, job.id, machine.request_cancel)
    assert asked.cancel_requested
    assert world.wait_end(job).state == JobState.CANCELLED
    assert time.monotonic() - began < 2.0
    until(lambda: world.bus.backlog(topic_for("tokenize", "interactive"), "test") == 0)
    assert list(world.store.list(f"jobs/{job.id}/")) == []


def test_a_job_that_is_cancelled_before_its_turn_never_runs(world: World) -> None:
    job = world.submit()
    assert machine.apply(world.jobs, job.id, machine.request_cancel).state == JobState.CANCELLED
    handler = FakeHandler()
    world.work(handler)
    until(lambda: world.bus.backlog(topic_for("tokenize", "interactive"), "test") == 0)
    assert handler.runs == []


def test_a_job_past_its_deadline_fails(world: World) -> None:
    def work_for_long(step: StepContext) -> None:
        while True:
            step.check_cancelled()
            time.sleep(0.01)

    job = world.submit(timeout_s=0.3)
    world.work(FakeHandler(act=work_for_long))
    ended = world.wait_end(job)
    assert ended.error is not None
    assert (ended.state, ended.error.code) == (JobState.FAILED, "deadline_exceeded")
    assert world.dead_letters(DLQ_FAILED) == []


def test_a_draining_worker_finishes_its_step_and_takes_no_other(world: World) -> None:
    handler = FakeHandler(act=lambda step: time.sleep(0.4))
    first, second = world.submit(), world.submit()
    worker = world.work(handler)
    until(lambda: handler.runs)
    worker.stop()
    world.workers[0][1].join(timeout=5)
    done = [job for job in (first, second) if world.jobs.get(job.id).step_index == 1]
    assert [job.id for job in done] == handler.runs


def test_a_step_that_outlasts_the_drain_is_handed_back_uncounted(world: World) -> None:
    def work_for_long(step: StepContext) -> None:
        while True:
            step.check_cancelled()
            time.sleep(0.01)

    slow = FakeHandler(act=work_for_long)
    job = world.submit()
    worker = world.work(slow, drain_s=0.2)
    until(lambda: slow.runs)
    worker.stop()
    world.workers[0][1].join(timeout=5)
    released = world.jobs.get(job.id)
    assert (released.lease, released.attempts) == (None, 0)
    quick = FakeHandler()
    world.work(quick)
    assert world.wait(job, at_step(1)).timings[0].attempts == 1


def test_a_late_step_holds_back_the_commits_of_its_partition(world: World) -> None:
    """Two jobs of one partition, the first slow: nothing is committed past the first until it is done."""
    go = threading.Event()
    slow_ids: set[str] = set()

    def wait_if_slow(step: StepContext) -> None:
        if step.job.id in slow_ids:
            go.wait(PATIENCE_S)

    world.bus = MemoryBus(partitions=1)
    first = world.submit()
    slow_ids.add(first.id)
    second = world.submit()
    topic = topic_for("tokenize", "interactive")
    world.work(FakeHandler(act=wait_if_slow), slots=2)
    world.wait(second, at_step(1))
    time.sleep(0.1)
    assert world.bus.backlog(topic, "test") == 2
    go.set()
    until(lambda: world.bus.backlog(topic, "test") == 0)


def test_interactive_messages_go_before_batch_ones(world: World) -> None:
    batch = [world.submit(lane="batch") for _ in range(3)]
    urgent = [world.submit() for _ in range(3)]
    handler = FakeHandler(act=lambda step: time.sleep(0.05))
    world.work(handler)
    until(lambda: len(handler.runs) == 6)
    assert set(handler.runs[:3]) == {job.id for job in urgent}
    assert set(handler.runs[3:]) == {job.id for job in batch}


def test_a_bus_that_is_away_for_a_while_delays_the_job_and_loses_nothing(world: World) -> None:
    class FlakyBus(MemoryBus):
        failures = 2

        def publish(self, topic: str, key: str, value: bytes, headers: Headers = ()) -> None:
            if self.failures:
                self.failures -= 1
                raise BusUnavailable("The broker is away.")
            world.bus.publish(topic, key, value, headers)

    flaky = FlakyBus()
    flaky.subscribe = world.bus.subscribe  # type: ignore[method-assign]
    handler = FakeHandler()
    job = world.submit()
    world.work(handler, flaky)
    for kind in ("generate", "decode"):
        world.work(FakeHandler(kind))
    assert world.wait_end(job).state == JobState.DONE
    assert handler.runs == [job.id]


def test_a_worker_outlasts_a_broker_that_gives_no_messages_for_a_while(world: World) -> None:
    class SilentReader:
        """A subscription whose first polls fail."""

        def __init__(self, inner: Subscription) -> None:
            self._inner = inner
            self._failures = 2

        def __getattr__(self, name: str) -> object:
            return getattr(self._inner, name)

        def poll(self, timeout_s: float, max_records: int = 1) -> list[Delivery]:
            if self._failures:
                self._failures -= 1
                raise BusUnavailable("The broker is away.")
            return self._inner.poll(timeout_s, max_records)

    real = world.bus.subscribe
    world.bus.subscribe = lambda *args, **kwargs: SilentReader(real(*args, **kwargs))  # type: ignore
    job = world.submit()
    world.work(FakeHandler())
    world.wait(job, at_step(1))


def test_the_sweeper_publishes_a_job_whose_message_was_never_sent(world: World) -> None:
    accepted = machine.accept(JobRequest(edit=Edit(type="denoise")), world.jobs.now() - 100)
    job = world.jobs.create(accepted.job, accepted.events).job
    sweeper = Sweeper(world.jobs, world.bus, world.store)
    assert sweeper.sweep() == 1
    assert sweeper.sweep() == 0
    world.work(FakeHandler())
    world.wait(job, at_step(1))


def test_the_sweeper_puts_every_open_job_back_after_a_bus_lost_its_records(world: World) -> None:
    job = world.submit()
    world.bus = MemoryBus()
    sweeper = Sweeper(world.jobs, world.bus, world.store)
    assert sweeper.sweep() == 0
    assert sweeper.sweep(everything=True) == 1
    world.work(FakeHandler())
    world.wait(job, at_step(1))


def test_the_sweeper_fails_late_jobs_and_forgets_expired_ones(world: World) -> None:
    long_ago = world.jobs.now() - 1000
    late = machine.accept(JobRequest(edit=Edit(type="denoise"), timeout_s=1.0), long_ago, keep_s=10.0)
    world.jobs.create(late.job, late.events)
    world.store.put(f"jobs/{late.job.id}/source/audio", b"x")
    Sweeper(world.jobs, world.bus, world.store).sweep()
    assert world.jobs.list().jobs == []
    assert list(world.store.list(f"jobs/{late.job.id}/")) == []


def test_the_sweeper_forgets_uploads_of_yesterday(tmp_path: Path) -> None:
    now = time.time()
    store = FolderStore(tmp_path, clock=lambda: now)
    store.put("uploads/ann/1", b"x")
    Sweeper(MemoryJobStore(), MemoryBus(), store).sweep()
    assert store.get("uploads/ann/1") == b"x"
    now += 100_000
    Sweeper(MemoryJobStore(), MemoryBus(), store).sweep()
    assert list(store.list("uploads/")) == []


def test_progress_is_told_and_never_falls(world: World) -> None:
    def notes(job_id: str) -> list[tuple[str, float]]:
        events = world.jobs.events(job_id)
        return [(event.note, round(event.progress, 3)) for event in events if event.type == "progress"]

    def tell(step: StepContext) -> None:
        step.progress(0.1, "begun")
        step.progress(0.5, "halfway")
        give_up_at = time.monotonic() + PATIENCE_S
        while slow and not notes(step.job.id) and time.monotonic() < give_up_at:
            time.sleep(0.01)
        step.measure("rtf", 0.25)

    slow = True
    job = world.submit()
    world.work(FakeHandler(act=tell))
    moved = world.wait(job, at_step(1))
    assert moved.timings[0].metrics == {"rtf": 0.25}
    assert notes(job.id) == [("halfway", 0.167)]
    slow = False
    quick = world.submit()
    world.wait(quick, at_step(1))
    assert notes(quick.id) == [], "a step that is over at once tells its end alone"
