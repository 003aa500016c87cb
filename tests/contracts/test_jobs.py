"""The job store's promises."""

import threading
import time
from functools import partial

import pytest

from shared.jobs import machine
from shared.jobs.machine import Fenced, JobClosed, NotNow, StaleStep
from shared.jobs.port import (
    Idempotency,
    IdempotencyConflict,
    JobExists,
    JobNotFound,
    JobStore,
    TooManyOpen,
    VersionConflict,
)
from shared.schemas import Edit, Job, JobError, JobRequest, JobState


def request(**changes: object) -> JobRequest:
    return JobRequest.model_validate({"edit": Edit(type="emotion", detail="happy"), "text": "Hello.", **changes})


def create(jobs: JobStore, idempotency: Idempotency | None = None, **changes: object) -> Job:
    accepted = machine.accept(request(), jobs.now())
    job = accepted.job.model_copy(update=changes)
    return jobs.create(job, accepted.events, idempotency=idempotency).job


def acquire(jobs: JobStore, job: Job, owner: str = "worker", ttl_s: float = 30.0, step: int = 0) -> Job:
    return machine.apply(jobs, job.id, lambda job, now: machine.acquire(job, step, owner, ttl_s, now))


def advance_with(token: int, job: Job, now: float) -> machine.Move:
    return machine.advance(job, token, now)


def test_a_created_job_comes_back_whole(jobs: JobStore) -> None:
    job = create(jobs, trace={"traceparent": "00-1"})
    assert job.version == 1
    assert jobs.get(job.id) == job
    with pytest.raises(JobExists):
        jobs.create(job)
    with pytest.raises(JobNotFound, match="job_nowhere"):
        jobs.get("job_nowhere")


def test_a_write_by_an_old_version_is_refused(jobs: JobStore) -> None:
    job = create(jobs)
    newer = jobs.replace(job.model_copy(update={"note": "first"}))
    assert newer.version == job.version + 1
    with pytest.raises(VersionConflict):
        jobs.replace(job.model_copy(update={"note": "second"}))
    assert jobs.get(job.id).note == "first"
    with pytest.raises(JobNotFound):
        jobs.replace(job.model_copy(update={"id": "job_nowhere"}))


def test_of_many_writers_one_wins_each_version(jobs: JobStore) -> None:
    job = create(jobs)
    wins: list[int] = []

    def write() -> None:
        for _ in range(5):
            moved = machine.apply(
                jobs, job.id, lambda job, now: machine.Move(job.model_copy(update={"attempts": job.attempts + 1}))
            )
            wins.append(moved.version)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert jobs.get(job.id).attempts == 20
    assert sorted(wins) == list(range(2, 22))


def test_of_many_workers_one_gets_the_lease(jobs: JobStore) -> None:
    job = create(jobs)
    got: list[str] = []

    def work(owner: str) -> None:
        try:
            acquire(jobs, job, owner)
            got.append(owner)
        except NotNow:
            pass

    threads = [threading.Thread(target=work, args=(f"worker-{number}",)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    lease = jobs.get(job.id).lease
    assert lease is not None
    assert lease.owner == got[0]


def test_a_lease_that_ran_out_passes_on_and_its_old_token_is_refused(jobs: JobStore) -> None:
    job = create(jobs)
    old = acquire(jobs, job, "slow", ttl_s=0.05)
    time.sleep(0.1)
    new = acquire(jobs, job, "fresh")
    assert old.lease is not None
    assert new.lease is not None
    assert new.lease.token > old.lease.token
    stale = old.lease.token
    for move in (
        lambda job, now: machine.advance(job, stale, now),
        lambda job, now: machine.renew(job, stale, 30.0, now),
        lambda job, now: machine.report(job, stale, 0.5, "half", now),
        lambda job, now: machine.fail(job, stale, JobError(code="x", message="x"), now),
    ):
        with pytest.raises(Fenced):
            machine.apply(jobs, job.id, move)
    assert jobs.get(job.id) == new


def test_a_job_goes_through_its_route_and_tells_every_step(jobs: JobStore) -> None:
    job = create(jobs)
    for step in range(3):
        held = acquire(jobs, job, step=step)
        token = held.last_token
        job = machine.apply(jobs, job.id, partial(advance_with, token))
    assert job.state == JobState.DONE
    assert job.progress == 1.0
    events = jobs.events(job.id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.type for event in events] == ["accepted", *["started", "step"] * 3, "done"]
    with pytest.raises(JobClosed):
        acquire(jobs, job, step=2)


def test_a_message_about_a_past_step_is_known_as_stale(jobs: JobStore) -> None:
    job = create(jobs)
    held = acquire(jobs, job)
    machine.apply(jobs, job.id, lambda job, now: machine.advance(job, held.last_token, now))
    with pytest.raises(StaleStep):
        acquire(jobs, job, step=0)


def test_a_reader_resumes_the_events_after_the_last_one_it_saw(jobs: JobStore) -> None:
    job = create(jobs)
    acquire(jobs, job)
    assert [event.type for event in jobs.events(job.id, after=1)] == ["started"]
    assert jobs.events(job.id, after=2) == []
    assert [event.type for event in jobs.events(job.id, limit=1)] == ["accepted"]
    with pytest.raises(JobNotFound):
        jobs.events("job_nowhere")


def test_a_waiting_reader_wakes_when_an_event_comes(jobs: JobStore) -> None:
    job = create(jobs)
    later = threading.Timer(0.2, lambda: acquire(jobs, job))
    later.start()
    began = time.monotonic()
    events = jobs.events(job.id, after=1, wait_s=10.0)
    later.join()
    assert [event.type for event in events] == ["started"]
    assert time.monotonic() - began < 5.0
    assert jobs.events(job.id, after=2, wait_s=0.1) == []


def test_one_idempotency_key_makes_one_job(jobs: JobStore) -> None:
    first = create(jobs, Idempotency("key-1", "body-1"))
    again = machine.accept(request(), jobs.now())
    created = jobs.create(again.job, again.events, idempotency=Idempotency("key-1", "body-1"))
    assert not created.is_new
    assert created.job.id == first.id
    with pytest.raises(JobNotFound):
        jobs.get(again.job.id)
    with pytest.raises(IdempotencyConflict):
        jobs.create(again.job, idempotency=Idempotency("key-1", "body-2"))
    other = again.job.model_copy(update={"owner": "somebody-else"})
    assert jobs.create(other, idempotency=Idempotency("key-1", "body-2")).is_new


def test_of_many_posts_with_one_key_one_makes_the_job(jobs: JobStore) -> None:
    made: list[tuple[str, bool]] = []

    def post() -> None:
        accepted = machine.accept(request(), jobs.now())
        created = jobs.create(accepted.job, accepted.events, idempotency=Idempotency("key-2", "body"))
        made.append((created.job.id, created.is_new))

    threads = [threading.Thread(target=post) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({job_id for job_id, _ in made}) == 1
    assert sum(is_new for _, is_new in made) == 1


def test_of_many_jobs_at_once_no_more_get_in_than_the_owner_may_have_open(jobs: JobStore) -> None:
    made: list[str] = []
    refused: list[TooManyOpen] = []

    def post() -> None:
        accepted = machine.accept(request(), jobs.now(), owner="ada")
        try:
            made.append(jobs.create(accepted.job, accepted.events, open_max=3).job.id)
        except TooManyOpen as error:
            refused.append(error)

    threads = [threading.Thread(target=post) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(refused), jobs.count_open("ada")) == (3, 9, 3)
    assert jobs.count_open("bob") == 0
    machine.apply(jobs, made[0], machine.request_cancel)
    assert jobs.count_open("ada") == 2
    post()
    assert len(made) == 4
    machine.apply(jobs, made[1], machine.discard)
    assert jobs.count_open("ada") == 2


def test_a_known_key_gives_its_job_also_to_an_owner_who_may_have_no_more(jobs: JobStore) -> None:
    once = Idempotency("key", "body")
    first = machine.accept(request(), jobs.now())
    made = jobs.create(first.job, first.events, idempotency=once, open_max=1)
    again = machine.accept(request(), jobs.now())
    assert jobs.create(again.job, again.events, idempotency=once, open_max=1).job.id == made.job.id


def test_a_forgotten_idempotency_key_can_be_used_again(jobs: JobStore) -> None:
    create(jobs, Idempotency("key-3", "body-1", keep_s=0.05))
    time.sleep(0.1)
    accepted = machine.accept(request(), jobs.now())
    assert jobs.create(accepted.job, idempotency=Idempotency("key-3", "body-2")).is_new


def test_jobs_are_listed_newest_first_in_pages(jobs: JobStore) -> None:
    ids = []
    for number in range(5):
        ids.append(create(jobs, id=f"job_{number:04d}", owner="ann" if number != 2 else "bob").id)
    page = jobs.list(owner="ann", limit=3)
    assert [job.id for job in page.jobs] == [ids[4], ids[3], ids[1]]
    rest = jobs.list(owner="ann", limit=3, cursor=page.cursor)
    assert [job.id for job in rest.jobs] == [ids[0]]
    assert rest.cursor is None
    assert jobs.list(states=[JobState.DONE]).jobs == []
    assert len(jobs.list(states=[JobState.ACCEPTED, JobState.DONE]).jobs) == 5


def test_overdue_jobs_are_found_until_they_end(jobs: JobStore) -> None:
    now = jobs.now()
    late, later = create(jobs, due_at=now - 20), create(jobs, due_at=now - 10)
    create(jobs, due_at=now + 1000)
    assert [job.id for job in jobs.due(now)] == [late.id, later.id]
    assert [job.id for job in jobs.due(now, limit=1)] == [late.id]
    machine.apply(jobs, late.id, machine.request_cancel)
    assert [job.id for job in jobs.due(now)] == [later.id]


def test_expired_jobs_are_forgotten_with_their_events(jobs: JobStore) -> None:
    now = jobs.now()
    ended, running = create(jobs, expires_at=now - 1), create(jobs, expires_at=now - 1)
    machine.apply(jobs, ended.id, machine.request_cancel)
    assert jobs.purge(now) == [ended.id]
    with pytest.raises(JobNotFound):
        jobs.events(ended.id)
    assert jobs.get(running.id).id == running.id
    assert ended.id not in [job.id for job in jobs.list().jobs]


def test_the_store_answers_a_ping_and_closes_twice(jobs: JobStore) -> None:
    jobs.ping()
    jobs.close()
    jobs.close()
