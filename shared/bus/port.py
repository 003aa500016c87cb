"""The port for messages between services.

What every bus promises; each adapter is tested against it by one contract suite.

At least once: a record is delivered until its partition is committed past it, also after its reader crashed. Records
of one key lie in one partition in the order in which they were published. A commit is a position, not a receipt: the
reader commits in order, and a commit by a reader that lost its partition may or may not be refused, so it fences its
effects elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from shared.errors import PermanentError, TransientError, UserError

RECORD_BYTES_MAX = 1_000_000
"""The largest value of a record, some way below what brokers take with its headers."""

Headers = tuple[tuple[str, bytes], ...]


class BusUnavailable(TransientError):
    """The broker did not take or give a record in time, or its buffer is full."""

    default_code = "bus_unavailable"


class CommitRefused(TransientError):
    """The partition moved to another reader before the commit; the record will be delivered again."""

    default_code = "commit_refused"


class RecordTooLarge(UserError):
    """A record's value is larger than any bus takes."""

    default_code = "record_too_large"
    default_http_status = 413


class ListenerFailed(PermanentError):
    """A reader's own callback failed when partitions came or went: what it knows of them is wrong from here on."""

    default_code = "listener_failed"


class Partition(NamedTuple):
    """One ordered log of a topic."""

    topic: str
    number: int


@dataclass(frozen=True)
class Delivery:
    """One record as a reader got it."""

    partition: Partition
    offset: int
    key: str
    value: bytes
    headers: Headers = ()
    published_at: float = 0.0

    @property
    def topic(self) -> str:
        return self.partition.topic


Moved = Callable[[frozenset[Partition]], None]


class Subscription(Protocol):
    """One member of a group of readers.

    Every method is called by one and the same thread; the callbacks run inside `poll`. What a callback raises comes out
    of `poll` as ListenerFailed: the reader closes the subscription then, and its partitions go to another member.
    """

    def poll(self, timeout_s: float, max_records: int = 1) -> list[Delivery]:
        """Up to `max_records` new records of unpaused partitions, or an empty list after `timeout_s`.

        Also keeps the membership.
        """
        ...

    def commit(self, positions: Mapping[Partition, int]) -> None:
        """Store the offset to read next of each partition.

        Raises CommitRefused or BusUnavailable; both mean redelivery.
        """
        ...

    def assignment(self) -> frozenset[Partition]:
        """The partitions that this member reads now."""
        ...

    def pause(self, partitions: Collection[Partition]) -> None:
        """Stop handing out records of these assigned partitions. A partition that is assigned anew comes unpaused."""
        ...

    def resume(self, partitions: Collection[Partition]) -> None:
        """Hand out records of these partitions again."""
        ...

    def close(self) -> None:
        """Leave the group. What is not committed goes to another member. Safe to call twice."""
        ...


def check_size(topic: str, value: bytes) -> None:
    """Raise RecordTooLarge for a value that a bus does not take."""
    if len(value) > RECORD_BYTES_MAX:
        raise RecordTooLarge(f"A record of {len(value)} bytes is too large for {topic}.",
                             f"At most {RECORD_BYTES_MAX} bytes; put the data in the artifact store.")  # fmt: skip


class Bus(Protocol):
    """A broker's client. `publish` may be called by any thread."""

    @property
    def system(self) -> str:
        """What spans name as their messaging.system."""
        ...

    def publish(self, topic: str, key: str, value: bytes, headers: Headers = ()) -> None:
        """Add a record; returns when the broker holds it as safely as it ever will.

        Raises BusUnavailable, RecordTooLarge.
        """
        ...

    def subscribe(
        self,
        topics: Sequence[str],
        group: str,
        *,
        on_assigned: Moved | None = None,
        on_revoked: Moved | None = None,
        urgent: bool = True,
    ) -> Subscription:
        """Join `group` on `topics`. A group that is new to a topic starts at its first record.

        What is not `urgent` may come a quarter of a second late, which saves the broker questions.
        """
        ...

    def backlog(self, topic: str, group: str) -> int:
        """Records of a topic that a group has not committed. Raises BusUnavailable."""
        ...

    def ping(self) -> None:
        """Return if the broker answers; raise BusUnavailable otherwise."""
        ...

    def close(self) -> None:
        """Close the client and its subscriptions. Safe to call twice."""
        ...
