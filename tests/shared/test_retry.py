"""Which errors are tried again, how often, and after how long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import MissingComponent, PermanentError, PoisonError, TransientError, UserError
from shared.retry import RetryPolicy, job_error


@given(attempts=st.integers(1, 100), chance=st.floats(0.0, 1.0, exclude_max=True))
def test_waits_grow_to_their_bound_and_vary(attempts: int, chance: float) -> None:
    policy = RetryPolicy(base_s=1.0, max_s=60.0, random=lambda: chance)
    full = min(60.0, 2.0 ** (attempts - 1))
    assert full / 2 <= policy.delay_s(attempts) <= full


@pytest.mark.parametrize(
    ("error", "allowed"),
    [
        (TransientError("away"), [True] * 6 + [False]),
        (ValueError("unforeseen"), [True] + [False] * 6),
        (PermanentError("damaged"), [False] * 7),
        (PoisonError("unreadable"), [False] * 7),
        (UserError("silent"), [False] * 7),
    ],
)
def test_the_class_of_an_error_decides_how_often_it_is_tried(error: Exception, allowed: list[bool]) -> None:
    assert [RetryPolicy().allows(error, attempts) for attempts in range(1, 8)] == allowed


@pytest.mark.parametrize(
    ("error", "dead"),
    [
        (UserError("silent"), False),
        (MissingComponent("flow", "x"), False),
        (PermanentError("x"), True),
        (KeyError("x"), True),
    ],
)
def test_what_a_user_can_mend_is_no_dead_letter(error: Exception, dead: bool) -> None:
    assert job_error(error).dead_letter is dead


def test_an_unforeseen_error_is_told_with_its_type() -> None:
    assert job_error(KeyError("mixed")).message == "KeyError: 'mixed'"
