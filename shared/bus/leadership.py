"""Helps a Kafka group whose broker names a leader that is no longer a member.

Only the leader deals out partitions, so such a group waits forever. Apache Kafka never gets there: it names another
leader when one expires. Tansu, the local stack's broker, does when its leader dies or leaves at certain moments, and
that until it is restarted. Knows the consumer's coordinator (kafka-python 3), and nothing about records.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import Any

log = logging.getLogger(__name__)


class LeaderWatch:
    """Watches how one member joins its group. `members` asks the broker for the ids of all members."""

    def __init__(self, coordinator: Any, members: Callable[[], Collection[str]], patience_s: float) -> None:
        self._coordinator = coordinator
        self._members = members
        self._patience_s = patience_s
        self._leader = ""
        self._since: float | None = None
        self._process_join = coordinator._process_join_group_response
        coordinator._process_join_group_response = self._joined

    def check(self) -> None:
        """To be called between polls. After `patience_s` of waiting for a leader that is gone, take its place.

        Of all members only the one with the least id does so: it joins under the leader's id, which a broker that
        names this leader takes, and any other refuses as unknown. Errors of `members` are passed on.
        """
        own, now = self._coordinator._generation.member_id, time.monotonic()
        if not self._coordinator.need_rejoin() or self._leader in ("", own):
            self._since = None
        elif self._since is None:
            self._since = now
        elif now - self._since >= self._patience_s:
            self._since = now
            members = self._members()
            if members and self._leader not in members and own == min(members):
                log.warning("the group waits for its leader %s, which is gone: taking its place", self._leader)
                self._coordinator.reset_generation(member_id=self._leader)

    def _joined(self, response: Any, sent_at: float) -> Any:
        self._leader = response.leader
        return self._process_join(response, sent_at)
