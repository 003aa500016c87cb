"""When a call is made again, and after how long."""

from __future__ import annotations

import random
from dataclasses import dataclass

import httpx

from editx_client.errors import retry_after

AGAIN = frozenset({429, 502, 503, 504})
IN_PROGRESS = 409


@dataclass(frozen=True)
class Retries:
    """Up to `attempts` attempts, `base_s` seconds apart and doubling, with jitter; the gateway's own wish goes first.

    A wish longer than `longest_s` is not waited for: the refusal is raised.
    """

    attempts: int = 5
    base_s: float = 0.25
    longest_s: float = 60.0

    def wait_s(self, attempt: int, response: httpx.Response | None) -> float | None:
        """Seconds to wait after attempt number `attempt`; None where it should be the last."""
        if attempt >= self.attempts:
            return None
        if response is not None:
            if response.status_code not in AGAIN and not _in_progress(response):
                return None
            wished = retry_after(response)
            if wished is not None:
                return wished if wished <= self.longest_s else None
        backoff: float = self.base_s * 2.0 ** (attempt - 1)
        return min(backoff, self.longest_s) * random.uniform(0.5, 1.0)


def _in_progress(response: httpx.Response) -> bool:
    """Whether a 409 only says that the same request is being accepted right now."""
    return response.status_code == IN_PROGRESS and b"idempotency_in_progress" in response.content
