"""Waiting for models and artifacts that are away."""

from __future__ import annotations

from shared.surroundings import Surroundings
from tests.shared.worlds import until


def test_a_question_that_fails_counts_as_no_and_is_asked_again() -> None:
    answers = iter([ValueError("nobody foresaw this"), False, True])

    def answer() -> bool:
        found = next(answers)
        if isinstance(found, Exception):
            raise found
        return bool(found)

    surroundings = Surroundings(answer, every_s=0.01)
    surroundings.await_first()
    assert not surroundings.are_there
    until(lambda: surroundings.are_there)


def test_a_failure_long_after_an_outage_is_nobodys_but_the_steps() -> None:
    surroundings = Surroundings(lambda: True, every_s=0.01)
    surroundings.await_first()
    until(lambda: surroundings.are_there)
    assert not surroundings.are_away()
