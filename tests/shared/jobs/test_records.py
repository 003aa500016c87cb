"""Records that this release cannot read: whoever asks is told, lists and sweeps go on without them."""

import sqlite3
from pathlib import Path

import pytest

from shared.errors import PoisonError
from shared.jobs import machine
from shared.jobs.records import read_record, read_records
from shared.jobs.sqlite import SqliteJobStore
from shared.schemas import Edit, JobRequest


def test_a_record_that_cannot_be_read_says_where() -> None:
    with pytest.raises(PoisonError, match="request: Field required"):
        read_record('{"id": "job_1"}')
    assert read_records(["{}", "no JSON"]) == []


def test_one_record_of_another_release_stops_neither_lists_nor_sweeps(tmp_path: Path) -> None:
    file = tmp_path / "jobs.sqlite"
    store = SqliteJobStore(file)
    accepted = [machine.accept(JobRequest(edit=Edit(type="denoise")), store.now()) for _ in range(3)]
    ids = sorted(store.create(one.job, one.events).job.id for one in accepted)
    with sqlite3.connect(file) as database:
        database.execute('UPDATE jobs SET body = \'{"of": "tomorrow"}\' WHERE id = ?', (ids[1],))
    assert {job.id for job in store.due(float("inf"))} == {ids[0], ids[2]}
    first = store.list(limit=2)
    assert [job.id for job in first.jobs] == [ids[2]]
    assert [job.id for job in store.list(limit=2, cursor=first.cursor).jobs] == [ids[0]]
    with pytest.raises(PoisonError):
        store.get(ids[1])
    store.close()
