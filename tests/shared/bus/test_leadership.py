"""A group whose broker names a leader that is gone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from shared.bus import leadership
from shared.bus.leadership import LeaderWatch


@dataclass
class Coordinator:
    """What the watch touches of kafka-python's."""

    own: str
    rejoins: bool = True
    taken: list[str] = field(default_factory=list)

    @property
    def _generation(self) -> Any:
        return SimpleNamespace(member_id=self.own)

    def need_rejoin(self) -> bool:
        return self.rejoins

    def reset_generation(self, member_id: str) -> None:
        self.taken.append(member_id)

    def _process_join_group_response(self, response: Any, sent_at: float) -> Any:
        return response


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(leadership, "time", clock)
    return clock


def wait(coordinator: Coordinator, clock: Clock, *, leader: str, members: Collection[str], seconds: float) -> list[str]:
    """The places taken by a member that joins again and again for some seconds."""
    watch = LeaderWatch(coordinator, lambda: members, 6.0)
    for _ in range(round(seconds)):
        coordinator._process_join_group_response(SimpleNamespace(leader=leader), clock.now)
        watch.check()
        clock.now += 1.0
    return coordinator.taken


def test_the_first_member_takes_the_place_of_a_leader_that_is_gone(clock: Clock) -> None:
    assert wait(Coordinator("b"), clock, leader="a", members={"b", "c"}, seconds=8) == ["a"]


def test_no_other_member_takes_it_as_well(clock: Clock) -> None:
    assert wait(Coordinator("c"), clock, leader="a", members={"b", "c"}, seconds=30) == []


def test_a_leader_that_is_a_member_keeps_its_place_however_long_it_takes(clock: Clock) -> None:
    assert wait(Coordinator("b"), clock, leader="a", members={"a", "b"}, seconds=30) == []


def test_a_leader_is_given_time_before_anybody_asks(clock: Clock) -> None:
    assert wait(Coordinator("b"), clock, leader="a", members={"b"}, seconds=5) == []


def test_a_member_that_has_joined_asks_nothing(clock: Clock) -> None:
    assert wait(Coordinator("b", rejoins=False), clock, leader="a", members={"b"}, seconds=30) == []


def test_the_leader_itself_waits_for_nobody(clock: Clock) -> None:
    assert wait(Coordinator("a"), clock, leader="a", members=(), seconds=30) == []
