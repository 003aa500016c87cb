"""Call rates in a Redis protocol server, counted in Lua by the server's clock, so that all gateways share them."""

from __future__ import annotations

import redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from shared.jobs.port import JobStoreUnavailable
from shared.jobs.quota import WINDOW_S

# KEYS: of the caller. ARGV: seconds that a call costs, seconds of burst. Times are microseconds, whole numbers in Lua.
_TAKE = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local paid_at = tonumber(redis.call('GET', KEYS[1]) or now)
if paid_at < now then paid_at = now end
paid_at = paid_at + math.floor(ARGV[1] * 1000000)
local wait = paid_at - now - ARGV[2] * 1000000
if wait > 0 then return wait end
redis.call('SET', KEYS[1], string.format('%.0f', paid_at), 'PX', math.ceil((paid_at - now) / 1000))
return 0
"""


class RedisQuota:
    """A Quota at a redis:// URL; all keys begin with `prefix`. What was counted is gone when the caller paid it off."""

    def __init__(self, url: str, *, prefix: str = "editx:", timeout_s: float = 5.0) -> None:
        self._prefix = prefix
        self._url = url.rpartition("@")[2]
        self._redis = redis.Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            health_check_interval=30,
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 2),
        )
        self._take = self._redis.register_script(_TAKE)

    def take(self, key: str, per_minute: int) -> float:
        try:
            waits_us = self._take(keys=[f"{self._prefix}quota:{key}"], args=[WINDOW_S / per_minute, WINDOW_S])
        except (RedisError, OSError) as error:
            raise JobStoreUnavailable(
                f"The job store at {self._url} did not count a call: {error}.", "Check that it runs."
            ) from error
        return float(waits_us) / 1e6  # type: ignore[arg-type]

    def close(self) -> None:
        self._redis.close()


def connect(url: str) -> RedisQuota:
    """redis://[user:password@]host:port/number, or rediss:// with TLS"""
    return RedisQuota(url)
