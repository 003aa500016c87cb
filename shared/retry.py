"""What to do with a step that failed: which errors are worth another attempt, how many, and after how long."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from shared.errors import EditxError, UserError
from shared.schemas.job import JobError


@dataclass(frozen=True)
class RetryPolicy:
    """Attempts and waits. `attempts_max` is for errors that may pass, `attempts_unknown_max` for errors nobody foresaw.

    The wait before attempt n + 1 is base_s * 2^(n - 1), at most max_s, times a random factor between 0.5 and 1: some
    50 s over all attempts, in which a server that died can come back.
    """

    attempts_max: int = 7
    attempts_unknown_max: int = 2
    base_s: float = 1.0
    max_s: float = 60.0
    random: Callable[[], float] = random.random

    def delay_s(self, attempts: int) -> float:
        """Seconds to wait after `attempts` failed attempts."""
        return float(min(self.max_s, self.base_s * 2.0 ** min(attempts - 1, 30)) * (0.5 + self.random() / 2))

    def allows(self, error: BaseException, attempts: int) -> bool:
        """Whether a step that failed with `error` at its attempt number `attempts` is tried again."""
        if isinstance(error, EditxError):
            return error.retryable and attempts < self.attempts_max
        return attempts < self.attempts_unknown_max


def job_error(error: BaseException) -> JobError:
    """An exception as a job keeps it. What a user caused is not a dead letter; what the system did not foresee is."""
    if isinstance(error, EditxError):
        return JobError(
            code=error.code,
            message=error.message,
            hint=error.hint,
            retryable=error.retryable,
            dead_letter=not isinstance(error, UserError) and error.code != "deadline_exceeded",
        )
    return JobError(
        code="internal_error",
        message=f"{type(error).__name__}: {error}",
        hint="This is a defect in editx; the worker's log has the details.",
        dead_letter=True,
    )
