"""Job records in one SQLite file: they survive the process, and processes of one machine may share them."""

from __future__ import annotations

import builtins
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shared.jobs.memory import idempotency_conflict, too_many_open
from shared.jobs.port import (
    Created,
    Idempotency,
    JobExists,
    JobNotFound,
    JobPage,
    JobStoreUnavailable,
    VersionConflict,
)
from shared.jobs.records import read_record, read_records
from shared.schemas.job import Job, JobEvent, JobState

BUSY_TIMEOUT_S = 10.0
EVENT_POLL_S = 0.05

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
  id TEXT PRIMARY KEY, version INTEGER NOT NULL, owner TEXT NOT NULL, state TEXT NOT NULL, ended INTEGER NOT NULL,
  due_at REAL NOT NULL, expires_at REAL, body TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS jobs_due ON jobs (due_at) WHERE ended = 0;
CREATE INDEX IF NOT EXISTS jobs_open ON jobs (owner) WHERE ended = 0;
CREATE INDEX IF NOT EXISTS jobs_expired ON jobs (expires_at) WHERE ended = 1;
CREATE TABLE IF NOT EXISTS events (
  job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE, seq INTEGER NOT NULL, body TEXT NOT NULL,
  PRIMARY KEY (job_id, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS idempotency (
  owner TEXT NOT NULL, key TEXT NOT NULL, fingerprint TEXT NOT NULL, until REAL NOT NULL,
  job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE, PRIMARY KEY (owner, key)) WITHOUT ROWID;
"""
_COUNT_OPEN = "SELECT count(*) FROM jobs WHERE owner = ? AND ended = 0"


class SqliteJobStore:
    """A JobStore in the file `path`. Each thread has its own connection; `clock` gives Unix seconds."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._local = threading.local()
        self._open: builtins.list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._closed = False
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._transaction() as database:
            for statement in _SCHEMA.split(";"):
                database.execute(statement)

    def now(self) -> float:
        return self._clock()

    def create(
        self,
        job: Job,
        events: Sequence[JobEvent] = (),
        *,
        idempotency: Idempotency | None = None,
        open_max: int | None = None,
    ) -> Created:
        with self._transaction() as database:
            if idempotency is not None:
                known = database.execute(
                    "SELECT fingerprint, until, body FROM idempotency JOIN jobs ON jobs.id = job_id"
                    " WHERE idempotency.owner = ? AND key = ?",
                    (job.owner, idempotency.key),
                ).fetchone()
                if known is not None and known[1] > self.now():
                    if known[0] != idempotency.fingerprint:
                        raise idempotency_conflict(idempotency.key)
                    return Created(read_record(known[2]), is_new=False)
            stored = job.model_copy(update={"version": 1})
            if open_max is not None and database.execute(_COUNT_OPEN, (job.owner,)).fetchone()[0] >= open_max:
                raise too_many_open(open_max)
            try:
                database.execute("INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?, ?)", _row(stored))
            except sqlite3.IntegrityError as error:
                raise JobExists(f"The job {job.id} is already stored.") from error
            if idempotency is not None:
                until = self.now() + idempotency.keep_s
                row = (job.owner, idempotency.key, idempotency.fingerprint, until, job.id)
                database.execute("INSERT OR REPLACE INTO idempotency VALUES (?, ?, ?, ?, ?)", row)
            _append(database, job.id, events)
        return Created(stored, is_new=True)

    def count_open(self, owner: str) -> int:
        return int(self._rows(_COUNT_OPEN, (owner,))[0][0])

    def get(self, job_id: str) -> Job:
        rows = self._rows("SELECT body FROM jobs WHERE id = ?", (job_id,))
        if not rows:
            raise JobNotFound(f"There is no job {job_id}.")
        return read_record(rows[0][0])

    def replace(self, job: Job, events: Sequence[JobEvent] = ()) -> Job:
        stored = job.model_copy(update={"version": job.version + 1})
        with self._transaction() as database:
            changed = database.execute(
                "UPDATE jobs SET version = ?2, owner = ?3, state = ?4, ended = ?5, due_at = ?6, expires_at = ?7,"
                " body = ?8 WHERE id = ?1 AND version = ?9",
                (*_row(stored), job.version),
            ).rowcount
            if not changed:
                if database.execute("SELECT 1 FROM jobs WHERE id = ?", (job.id,)).fetchone() is None:
                    raise JobNotFound(f"There is no job {job.id}.")
                raise VersionConflict(f"The job {job.id} is no longer at version {job.version}.")
            _append(database, job.id, events)
        return stored

    def events(self, job_id: str, *, after: int = 0, limit: int = 1000, wait_s: float = 0.0) -> builtins.list[JobEvent]:
        self.get(job_id)
        until = time.monotonic() + wait_s
        query = "SELECT seq, body FROM events WHERE job_id = ? AND seq > ? ORDER BY seq LIMIT ?"
        while True:
            rows = self._rows(query, (job_id, after, limit))
            if rows or time.monotonic() >= until:
                return [JobEvent.model_validate_json(body).model_copy(update={"seq": seq}) for seq, body in rows]
            time.sleep(EVENT_POLL_S)

    def list(
        self, *, owner: str | None = None, states: Collection[JobState] = (), limit: int = 50, cursor: str | None = None
    ) -> JobPage:
        marks = ", ".join("?" * len(states))
        wanted = f"AND state IN ({marks})" if states else ""
        query = (
            "SELECT id, body FROM jobs WHERE (?1 IS NULL OR owner = ?1) AND (?2 IS NULL OR id < ?2)"
            f" {wanted} ORDER BY id DESC LIMIT {int(limit) + 1}"
        )
        rows = self._rows(query, (owner, cursor, *states))
        found = read_records(body for _, body in rows[:limit])
        return JobPage(found, rows[limit - 1][0] if len(rows) > limit else None)

    def due(self, before: float, limit: int = 100) -> builtins.list[Job]:
        query = "SELECT body FROM jobs WHERE ended = 0 AND due_at <= ? ORDER BY due_at LIMIT ?"
        return read_records(row[0] for row in self._rows(query, (before, limit)))

    def purge(self, before: float, limit: int = 100) -> builtins.list[str]:
        with self._transaction() as database:
            query = "SELECT id FROM jobs WHERE ended = 1 AND expires_at <= ? LIMIT ?"
            gone = [row[0] for row in database.execute(query, (before, limit))]
            database.executemany("DELETE FROM jobs WHERE id = ?", [(job_id,) for job_id in gone])
        return gone

    def ping(self) -> None:
        self._rows("SELECT 1", ())

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for database in self._open:
                database.close()
            self._open.clear()

    def _rows(self, query: str, values: tuple[object, ...]) -> builtins.list[tuple[Any, ...]]:
        try:
            return self._database().execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise _unavailable(self._path, error) from error

    def _database(self) -> sqlite3.Connection:
        database: sqlite3.Connection | None = getattr(self._local, "database", None)
        if database is None or self._closed:
            with self._lock:
                if self._closed:
                    raise JobStoreUnavailable("The job store is closed.")
                try:
                    database = sqlite3.connect(
                        self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
                    )
                    database.execute("PRAGMA journal_mode = WAL")
                    database.execute("PRAGMA synchronous = FULL")
                    database.execute("PRAGMA foreign_keys = ON")
                except sqlite3.Error as error:
                    raise _unavailable(self._path, error) from error
                self._open.append(database)
            self._local.database = database
        return database

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        database = self._database()
        try:
            database.execute("BEGIN IMMEDIATE")
            yield database
            database.execute("COMMIT")
        except (sqlite3.OperationalError, sqlite3.ProgrammingError) as error:
            _roll_back(database)
            raise _unavailable(self._path, error) from error
        except BaseException:
            _roll_back(database)
            raise


def _roll_back(database: sqlite3.Connection) -> None:
    with suppress(sqlite3.Error):
        if database.in_transaction:
            database.execute("ROLLBACK")


def _unavailable(path: Path, error: sqlite3.Error) -> JobStoreUnavailable:
    return JobStoreUnavailable(
        f"The job store {path} did not answer: {error}.", "Check that its folder can be written."
    )


def _row(job: Job) -> tuple[object, ...]:
    ended = int(job.is_terminal)
    return (
        job.id, job.version, job.owner, job.state.value, ended, job.due_at, job.expires_at, job.model_dump_json(),
    )  # fmt: skip


def _append(database: sqlite3.Connection, job_id: str, events: Sequence[JobEvent]) -> None:
    if not events:
        return
    last = database.execute("SELECT coalesce(max(seq), 0) FROM events WHERE job_id = ?", (job_id,)).fetchone()[0]
    rows = [(job_id, last + number, event.model_dump_json()) for number, event in enumerate(events, 1)]
    database.executemany("INSERT INTO events VALUES (?, ?, ?)", rows)
