"""The port for call rates: how often somebody may call, counted in one place for all processes that ask.

A rate of n a minute allows bursts of n; then one call becomes free every 60/n seconds. Knows nothing about who calls.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

WINDOW_S = 60.0


class Quota(Protocol):
    """Counts calls by key. Every method may be called by any thread, and by many processes at once."""

    def take(self, key: str, per_minute: int) -> float:
        """Take one call: 0 when it was free, else the seconds until one will be, and nothing is taken.

        Raises JobStoreUnavailable.
        """
        ...

    def close(self) -> None:
        """Close the client. Safe to call twice."""
        ...


class MemoryQuota:
    """A Quota of this process alone. `clock` gives seconds.

    Of each key it keeps when its calls so far are all paid off, at a price of 60/n seconds each; a burst is paid later.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._paid_at: dict[str, float] = {}

    def take(self, key: str, per_minute: int) -> float:
        with self._lock:
            now = self._clock()
            self._paid_at = {known: at for known, at in self._paid_at.items() if at > now}
            paid_at = max(self._paid_at.get(key, now), now) + WINDOW_S / per_minute
            if (wait_s := paid_at - now - WINDOW_S) > 1e-6:
                return wait_s
            self._paid_at[key] = paid_at
            return 0.0

    def close(self) -> None:
        return
