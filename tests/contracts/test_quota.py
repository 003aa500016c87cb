"""The promises of the call rates, for every adapter."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator

import pytest

from shared.jobs.port import JobStoreUnavailable
from shared.jobs.quota import MemoryQuota, Quota
from shared.jobs.quota_redis import RedisQuota
from tests.fixtures.servers import shared_servers


def memory() -> Callable[[], Quota]:
    quota = MemoryQuota()
    return lambda: quota


def of_redis() -> Callable[[], Quota]:
    prefix = f"{uuid.uuid4().hex}:"
    return lambda: RedisQuota(shared_servers().redis, prefix=prefix)


@pytest.fixture(params=[memory, of_redis], ids=["memory", "redis"])
def another(request: pytest.FixtureRequest) -> Iterator[Callable[[], Quota]]:
    """Opens one more client of the same quota."""
    opened: list[Quota] = []
    connect = request.param()

    def open_one() -> Quota:
        opened.append(connect())
        return opened[-1]

    yield open_one
    for quota in opened:
        quota.close()
        quota.close()


def test_a_burst_of_a_minutes_calls_is_free_and_the_next_one_waits_its_share(another: Callable[[], Quota]) -> None:
    quota = another()
    assert [quota.take("eve", 3) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert 19.0 < quota.take("eve", 3) <= 20.0
    assert 19.0 < quota.take("eve", 3) <= 20.0  # a refusal takes nothing
    assert quota.take("ada", 3) == 0.0


def test_a_call_that_waited_as_long_as_it_was_told_is_free(another: Callable[[], Quota]) -> None:
    quota = another()
    while (wait_s := quota.take("eve", 120)) == 0.0:
        pass
    assert 0.0 < wait_s <= 0.5
    time.sleep(wait_s + 0.002)
    assert quota.take("eve", 120) == 0.0


def test_all_clients_share_one_count_even_at_the_same_moment(another: Callable[[], Quota]) -> None:
    clients = [another() for _ in range(4)]
    start, free = threading.Barrier(len(clients)), list[float]()

    def call(quota: Quota) -> None:
        start.wait()
        free.extend(wait_s for wait_s in (quota.take("eve", 10) for _ in range(10)) if wait_s == 0.0)

    threads = [threading.Thread(target=call, args=(quota,)) for quota in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(free) == 10


def test_a_server_that_is_away_is_told_of() -> None:
    quota = RedisQuota("redis://127.0.0.1:1/0", timeout_s=0.2)
    with pytest.raises(JobStoreUnavailable, match=r"127\.0\.0\.1:1"):
        quota.take("eve", 10)
    quota.close()
