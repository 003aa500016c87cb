"""A job's state only moves forward and ends once, whatever its workers, clients and clocks do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shared.jobs import machine
from shared.jobs.machine import Fenced, FutureStep, JobClosed, Move, NotNow, StaleStep
from shared.jobs.memory import MemoryJobStore
from shared.schemas import Edit, Job, JobError, JobRequest, JobState

NOW = 1_000.0
ERROR = JobError(code="x", message="x")
REFUSED = (Fenced, FutureStep, JobClosed, NotNow, StaleStep)
ORDER = [JobState.ACCEPTED, JobState.RUNNING]


def accepted(**changes: object) -> Job:
    return machine.accept(JobRequest.model_validate({"edit": Edit(type="denoise"), **changes}), NOW).job


class JobMachine(RuleBasedStateMachine):
    """Workers with leases of any age, a client that cancels, and a clock that moves, against one stored job."""

    def __init__(self) -> None:
        super().__init__()
        self.time = NOW
        self.jobs = MemoryJobStore(clock=lambda: self.time)
        first = machine.accept(JobRequest(edit=Edit(type="denoise"), iterations=2), self.time)
        self.job = self.jobs.create(first.job, first.events).job
        self.tokens: list[int] = [0]
        self.history: list[Job] = [self.job]

    def move(self, move: Callable[[Job, float], Move]) -> Job | None:
        try:
            self.job = machine.apply(self.jobs, self.job.id, move)
        except REFUSED:
            return None
        self.history.append(self.job)
        return self.job

    def token(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(self.tokens))

    @rule(seconds=st.floats(0.0, 50.0))
    def wait(self, seconds: float) -> None:
        self.time += seconds

    @rule(step=st.integers(0, 6), ttl_s=st.floats(1.0, 30.0))
    def acquire(self, step: int, ttl_s: float) -> None:
        before = self.job
        taken = self.move(lambda job, now: machine.acquire(job, step, "worker", ttl_s, now))
        if taken is not None:
            assert taken.last_token > max(self.tokens)
            assert before.lease is None or before.lease.expires_at <= self.time
            assert before.not_before <= self.time
            self.tokens.append(taken.last_token)

    @rule(data=st.data())
    def advance(self, data: st.DataObject) -> None:
        token, before = self.token(data), self.job
        if self.move(lambda job, now: machine.advance(job, token, now)) is not None:
            assert before.lease is not None
            assert before.lease.token == token

    @rule(data=st.data(), delay_s=st.floats(0.0, 20.0))
    def retry(self, data: st.DataObject, delay_s: float) -> None:
        token = self.token(data)
        self.move(lambda job, now: machine.retry(job, token, ERROR, delay_s, now))

    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        token = self.token(data)
        self.move(lambda job, now: machine.renew(job, token, 10.0, now))

    @rule(data=st.data(), fraction=st.floats(-1.0, 2.0))
    def report(self, data: st.DataObject, fraction: float) -> None:
        token = self.token(data)
        self.move(lambda job, now: machine.report(job, token, fraction, "", now))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        token = self.token(data)
        self.move(lambda job, now: machine.release(job, token, now))

    @rule(data=st.data(), chance=st.integers(0, 4))
    def fail(self, data: st.DataObject, chance: int) -> None:
        token = self.token(data)
        if chance == 0:
            self.move(lambda job, now: machine.fail(job, token, ERROR, now))

    @rule(chance=st.integers(0, 6))
    def cancel(self, chance: int) -> None:
        if chance == 0:
            self.move(machine.request_cancel)

    @rule(data=st.data())
    def close_cancelled(self, data: st.DataObject) -> None:
        token = self.token(data)
        if self.job.cancel_requested:
            self.move(lambda job, now: machine.close_cancelled(job, token, now))

    @rule(step=st.integers(0, 6))
    def dispatched(self, step: int) -> None:
        self.move(lambda job, now: machine.dispatched(job, step, now))

    @invariant()
    def state_moves_forward(self) -> None:
        if len(self.history) < 2:
            return
        before, after = self.history[-2:]
        assert not before.is_terminal or after is before or after == before
        if not after.is_terminal and not before.is_terminal:
            assert ORDER.index(after.state) >= ORDER.index(before.state)
        assert after.step_index >= before.step_index
        assert after.progress >= before.progress
        assert after.last_token >= before.last_token
        assert after.dispatched >= before.dispatched
        assert len(after.timings) == after.step_index
        assert after.attempts >= 0

    @invariant()
    def the_end_is_told_once(self) -> None:
        events = self.jobs.events(self.job.id)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        ends = [event for event in events if event.is_last]
        assert len(ends) == int(self.job.is_terminal)
        assert not ends or ends[0] is events[-1]
        if self.job.is_terminal:
            assert self.job.lease is None
            assert self.job.finished_at is not None
            assert (self.job.progress == 1.0) or self.job.state != JobState.DONE


TestJobMachine = JobMachine.TestCase
TestJobMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_cancel_of_a_waiting_job_ends_it_and_a_second_one_changes_nothing() -> None:
    cancelled = machine.request_cancel(accepted(), NOW).job
    assert cancelled.state == JobState.CANCELLED
    assert machine.request_cancel(cancelled, NOW) == Move(cancelled)


def test_a_cancel_of_a_running_job_waits_for_its_worker_unless_its_lease_ran_out() -> None:
    running = machine.acquire(accepted(), 0, "worker", 10.0, NOW).job
    assert machine.request_cancel(running, NOW + 1).job.state == JobState.RUNNING
    assert machine.request_cancel(running, NOW + 11).job.state == JobState.CANCELLED


def test_a_done_job_cannot_be_cancelled() -> None:
    job = accepted()
    for step in range(3):
        job = machine.acquire(job, step, "worker", 10.0, NOW).job
        job = machine.advance(job, job.last_token, NOW).job
    assert job.state == JobState.DONE
    with pytest.raises(JobClosed):
        machine.request_cancel(job, NOW)


def test_work_that_ends_after_a_cancel_was_asked_for_ends_as_cancelled() -> None:
    running = machine.acquire(accepted(), 0, "worker", 10.0, NOW).job
    asked = machine.request_cancel(running, NOW).job
    assert machine.advance(asked, asked.last_token, NOW).job.state == JobState.CANCELLED


@given(attempts=st.integers(1, 5))
def test_every_lease_of_a_step_counts_as_an_attempt_unless_it_is_released(attempts: int) -> None:
    job = accepted()
    for _ in range(attempts):
        job = machine.acquire(job, 0, "worker", 1.0, NOW).job
        job = machine.retry(job, job.last_token, ERROR, 0.0, NOW).job
    job = machine.acquire(job, 0, "worker", 1.0, NOW).job
    job = machine.release(job, job.last_token, NOW).job
    assert job.attempts == attempts
