"""Whether what a worker's steps need, models and the artifact store, answers. While it does not, no step begins.

A worker looks before its first job and after every failure that may come from outside, so an outage costs no attempt.
Knows nothing about what is asked.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from shared import telemetry

log = logging.getLogger(__name__)
SETTLE_S = 120.0
"""How long after an outage a failure may still be due to it: clients connect again each at their own pace."""


def _always() -> bool:
    return True


class Surroundings:
    """`answer` is asked, and may take seconds; while it says no, every `every_s` seconds in a thread of its own.

    After `patience_s` without a yes steps begin again and their failures count: jobs then end with the reason, instead
    of waiting for what never comes back.
    """

    def __init__(
        self, answer: Callable[[], bool] = _always, *, patience_s: float = 1800.0, every_s: float = 1.0
    ) -> None:
        self._answer = answer
        self._patience_s = patience_s
        self._every_s = every_s
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._away_since: float | None = None
        self._given_up = False
        self._back_at = float("-inf")

    @property
    def are_there(self) -> bool:
        """Whether steps may begin. Does not ask."""
        return self._away_since is None

    def await_first(self) -> None:
        """Count as away until the first yes. Returns at once."""
        if self._answer is not _always:
            self._begin()

    def are_away(self) -> bool:
        """Ask now, for a step that failed: whether an outage is to blame. One that lasts holds steps back."""
        if self._answers():
            self._given_up = False
            return time.monotonic() - self._back_at < SETTLE_S
        if self._given_up:
            return False
        self._begin()
        return True

    def close(self) -> None:
        """Ask no more."""
        self._closed.set()

    def _answers(self) -> bool:
        """The answer; a question that fails is none."""
        try:
            return self._answer()
        except Exception:
            log.exception("whether models and artifacts are there is not known")
            return False

    def _begin(self) -> None:
        with self._lock:
            if self._away_since is None:
                self._away_since = time.monotonic()
                threading.Thread(target=self._wait, name="surroundings", daemon=True).start()

    def _wait(self) -> None:
        """Ask until there is a yes, or no more patience."""
        began, told = time.monotonic(), False
        while not self._answers():
            if not told:
                told = True
                log.warning("models or artifacts are away: no job is taken until they are back")
                telemetry.instruments().outages.add(1)
            if time.monotonic() - began > self._patience_s:
                log.error("not back after %.0f s: jobs are taken again, and their failures count", self._patience_s)
                self._given_up = True
                break
            if self._closed.wait(self._every_s):
                break
        else:
            self._given_up = False
            if told:
                self._back_at = time.monotonic()
                log.info("models and artifacts are back after %.0f s", time.monotonic() - began)
        with self._lock:
            self._away_since = None
