"""Job records in a Redis protocol server: compare-and-set in Lua, an event log as a stream, indexes as sorted sets.

One primary is assumed, with an append-only file: what it answered survives its restart. Each write carries a random
mark, so a write that was repeated because its answer got lost is recognised as done.
"""

from __future__ import annotations

import builtins
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

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

CLOCK_CHECK_S = 5.0
EVENT_WAIT_MAX_S = 30.0

_COMMON = """
local function index(prefix, id, owner, due, expires)
  local open = prefix .. 'open:' .. owner
  if due ~= '' then
    redis.call('ZADD', prefix .. 'due', due, id)
    redis.call('SADD', open, id)
  else
    redis.call('ZREM', prefix .. 'due', id)
    redis.call('SREM', open, id)
  end
  if expires ~= '' then redis.call('ZADD', prefix .. 'expired', expires, id)
  else redis.call('ZREM', prefix .. 'expired', id) end
end
local function append(prefix, id, first)
  for place = first, #ARGV do
    local seq = redis.call('HINCRBY', prefix .. 'job:' .. id, 'seq', 1)
    redis.call('XADD', prefix .. 'events:' .. id, seq .. '-0', 'event', ARGV[place])
  end
end
"""
# ARGV: prefix, id, owner, body, due, expires, mark, [idempotency key, fingerprint, keep_ms] or three blanks,
# the most open jobs of the owner or a blank, events...
_CREATE = (
    _COMMON
    + """
local prefix, id, owner = ARGV[1], ARGV[2], ARGV[3]
local job = prefix .. 'job:' .. id
if redis.call('HGET', job, 'mark') == ARGV[7] then return {'made', ''} end
local key = prefix .. 'idempotency:' .. owner .. ':' .. ARGV[8]
if ARGV[8] ~= '' then
  local known = redis.call('HMGET', key, 'fingerprint', 'job')
  if known[1] then
    local body = redis.call('HGET', prefix .. 'job:' .. known[2], 'body')
    if body then
      if known[1] ~= ARGV[9] then return {'conflict', ''} end
      return {'known', body}
    end
  end
end
if redis.call('EXISTS', job) == 1 then return {'exists', ''} end
if ARGV[11] ~= '' and redis.call('SCARD', prefix .. 'open:' .. owner) >= tonumber(ARGV[11]) then
  return {'full', ''}
end
redis.call('HSET', job, 'version', 1, 'owner', owner, 'body', ARGV[4], 'seq', 0, 'mark', ARGV[7])
redis.call('ZADD', prefix .. 'jobs', 0, id)
redis.call('ZADD', prefix .. 'owner:' .. owner, 0, id)
index(prefix, id, owner, ARGV[5], ARGV[6])
append(prefix, id, 12)
if ARGV[8] ~= '' then
  redis.call('HSET', key, 'fingerprint', ARGV[9], 'job', id)
  redis.call('PEXPIRE', key, ARGV[10])
end
return {'made', ''}
"""
)
# ARGV: prefix, id, owner, body, due, expires, mark, version that is expected, events...
_REPLACE = (
    _COMMON
    + """
local prefix, id = ARGV[1], ARGV[2]
local job = prefix .. 'job:' .. id
local known = redis.call('HMGET', job, 'version', 'mark')
if not known[1] then return 'missing' end
if known[2] == ARGV[7] then return 'stored' end
if known[1] ~= ARGV[8] then return 'conflict' end
redis.call('HSET', job, 'version', ARGV[8] + 1, 'body', ARGV[4], 'mark', ARGV[7])
index(prefix, id, ARGV[3], ARGV[5], ARGV[6])
append(prefix, id, 9)
return 'stored'
"""
)
# ARGV: prefix, before, limit
_PURGE = """
local prefix = ARGV[1]
local ids = redis.call('ZRANGEBYSCORE', prefix .. 'expired', '-inf', ARGV[2], 'LIMIT', 0, ARGV[3])
for _, id in ipairs(ids) do
  local owner = redis.call('HGET', prefix .. 'job:' .. id, 'owner')
  redis.call('DEL', prefix .. 'job:' .. id, prefix .. 'events:' .. id)
  redis.call('ZREM', prefix .. 'expired', id)
  redis.call('ZREM', prefix .. 'jobs', id)
  if owner then redis.call('ZREM', prefix .. 'owner:' .. owner, id) end
end
return ids
"""


def connect(url: str) -> RedisJobStore:
    """redis://[user:password@]host:port/number, or rediss:// with TLS"""
    return RedisJobStore(url)


class RedisJobStore:
    """A JobStore at a redis:// URL; all keys begin with `prefix`."""

    def __init__(self, url: str, *, prefix: str = "editx:", timeout_s: float = 5.0) -> None:
        self._prefix = prefix
        self._url = url.rpartition("@")[2]
        self._redis = _client(url, timeout_s, timeout_s)
        self._waiting = _client(url, timeout_s, timeout_s + EVENT_WAIT_MAX_S)
        self._create, self._replace, self._purge = map(self._redis.register_script, (_CREATE, _REPLACE, _PURGE))
        self._clock = _ServerClock(self._server_time)
        self._closed = False

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
        stored = job.model_copy(update={"version": 1})
        once = ("", "", "0")
        if idempotency is not None:
            once = (idempotency.key, idempotency.fingerprint, str(max(int(idempotency.keep_s * 1000), 1)))
        most = "" if open_max is None else str(open_max)
        outcome, known = self._run(self._create, [*self._row(stored), *once, most, *_bodies(events)])
        if outcome == "known":
            return Created(read_record(known), is_new=False)
        if outcome == "conflict":
            raise idempotency_conflict(once[0])
        if outcome == "exists":
            raise JobExists(f"The job {job.id} is already stored.")
        if open_max is not None and outcome == "full":
            raise too_many_open(open_max)
        return Created(stored, is_new=True)

    def count_open(self, owner: str) -> int:
        with self._errors():
            return self._redis.scard(f"{self._prefix}open:{owner}")

    def get(self, job_id: str) -> Job:
        with self._errors():
            body = cast("str | None", self._redis.hget(f"{self._prefix}job:{job_id}", "body"))
        if body is None:
            raise JobNotFound(f"There is no job {job_id}.")
        return read_record(body)

    def replace(self, job: Job, events: Sequence[JobEvent] = ()) -> Job:
        stored = job.model_copy(update={"version": job.version + 1})
        outcome = self._run(self._replace, [*self._row(stored), str(job.version), *_bodies(events)])
        if outcome == "missing":
            raise JobNotFound(f"There is no job {job.id}.")
        if outcome == "conflict":
            raise VersionConflict(f"The job {job.id} is no longer at version {job.version}.")
        return stored

    def events(self, job_id: str, *, after: int = 0, limit: int = 1000, wait_s: float = 0.0) -> builtins.list[JobEvent]:
        log, last = f"{self._prefix}events:{job_id}", f"{after}-0"
        with self._errors():
            if not self._redis.exists(f"{self._prefix}job:{job_id}"):
                raise JobNotFound(f"There is no job {job_id}.")
            found = cast("list[Any]", self._redis.xrange(log, f"({last}", "+", count=limit))
            if not found and wait_s > 0:
                block_ms = max(int(min(wait_s, EVENT_WAIT_MAX_S) * 1000), 1)
                answer: Any = self._waiting.xread({log: last}, count=limit, block=block_ms)
                found = next(iter(dict(answer).values()), []) if answer else []
        return [_event(entry) for entry in found]

    def list(
        self, *, owner: str | None = None, states: Collection[JobState] = (), limit: int = 50, cursor: str | None = None
    ) -> JobPage:
        index = f"{self._prefix}jobs" if owner is None else f"{self._prefix}owner:{owner}"
        found: builtins.list[Job] = []
        while len(found) <= limit:
            top = "+" if cursor is None else f"({cursor}"
            with self._errors():
                ids = cast("list[str]", self._redis.zrevrangebylex(index, top, "-", start=0, num=limit + 1))
            if not ids:
                break
            cursor = ids[-1]
            found += [job for job in self._many(ids) if not states or job.state in states]
        return JobPage(found[:limit], found[limit - 1].id if len(found) > limit else None)

    def due(self, before: float, limit: int = 100) -> builtins.list[Job]:
        with self._errors():
            ids = self._redis.zrangebyscore(f"{self._prefix}due", "-inf", _score(before), start=0, num=limit)
        return self._many(cast("list[str]", ids))

    def purge(self, before: float, limit: int = 100) -> builtins.list[str]:
        return cast("list[str]", self._run(self._purge, [self._prefix, _score(before), limit]))

    def ping(self) -> None:
        with self._errors():
            self._redis.ping()

    def close(self) -> None:
        self._closed = True
        self._redis.close()
        self._waiting.close()

    def _many(self, ids: Sequence[str]) -> builtins.list[Job]:
        if not ids:
            return []
        with self._errors(), self._redis.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hget(f"{self._prefix}job:{job_id}", "body")
            bodies = pipe.execute()
        return read_records(body for body in bodies if body)

    def _row(self, job: Job) -> tuple[str, ...]:
        due = "" if job.is_terminal else _score(job.due_at)
        expires = _score(job.expires_at) if job.is_terminal and job.expires_at is not None else ""
        return self._prefix, job.id, job.owner, job.model_dump_json(), due, expires, secrets.token_hex(8)

    def _run(self, script: Callable[..., Any], arguments: Sequence[object]) -> Any:
        with self._errors():
            return script(keys=(), args=arguments)

    def _server_time(self) -> float:
        with self._errors():
            seconds, micros = self._redis.time()
        return seconds + micros / 1e6

    @contextmanager
    def _errors(self) -> Iterator[None]:
        if self._closed:
            raise JobStoreUnavailable("The job store is closed.")
        try:
            yield
        except (RedisError, OSError) as error:
            raise JobStoreUnavailable(
                f"The job store at {self._url} did not answer: {error}.", "Check that it runs."
            ) from error


class _ServerClock:
    """The server's clock, asked every few seconds and carried on in between by this machine's monotonic one."""

    def __init__(self, ask: Callable[[], float]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._offset = 0.0
        self._asked_at = -CLOCK_CHECK_S

    def __call__(self) -> float:
        with self._lock:
            if time.monotonic() - self._asked_at >= CLOCK_CHECK_S:
                before = time.monotonic()
                server = self._ask()
                self._asked_at = time.monotonic()
                self._offset = server - (before + self._asked_at) / 2
            return time.monotonic() + self._offset


def _client(url: str, connect_s: float, read_s: float) -> redis.Redis:
    return redis.Redis.from_url(
        url,
        decode_responses=True,
        socket_timeout=read_s,
        socket_connect_timeout=connect_s,
        health_check_interval=30,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 2),
    )


def _score(value: float) -> str:
    return "+inf" if value == float("inf") else repr(value)


def _bodies(events: Sequence[JobEvent]) -> builtins.list[str]:
    return [event.model_dump_json() for event in events]


def _event(entry: tuple[str, dict[str, str]]) -> JobEvent:
    identity, fields = entry
    return JobEvent.model_validate_json(fields["event"]).model_copy(update={"seq": int(identity.partition("-")[0])})
