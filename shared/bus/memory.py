"""A bus inside this process, with a broker's rules: partitions, groups, commits, and redelivery of what was not
committed.

Nothing outlives the process: the job store and the sweeper make up for that. A partition holds a bounded number of
records; a publisher waits for room and is refused after a while. On topics of dead letters and results, which hold no
work, the oldest record goes instead as long as nobody reads them.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from shared.bus.port import (
    BusUnavailable,
    CommitRefused,
    Delivery,
    Headers,
    ListenerFailed,
    Moved,
    Partition,
    check_size,
)
from shared.schemas.exchange import RESULTS

NEWS = ("editx.dlq.", RESULTS)
"""Topics that tell of something and hold no work: dead letters and results."""


@dataclass
class _Log:
    """The records of one partition that some group has yet to commit."""

    records: deque[Delivery] = field(default_factory=deque)
    first: int = 0

    @property
    def end(self) -> int:
        return self.first + len(self.records)

    def drop_until(self, offset: int) -> None:
        while self.records and self.first < offset:
            self.records.popleft()
            self.first += 1


@dataclass
class _Group:
    """The readers that share topics, and how far each partition is done."""

    members: list[MemorySubscription] = field(default_factory=list)
    topics: set[str] = field(default_factory=set)
    committed: dict[Partition, int] = field(default_factory=dict)


class MemoryBus:
    """A Bus for one process. Partitions of a topic are made when it is first used."""

    system = "editx"

    def __init__(self, partitions: int = 4, capacity: int = 10_000, publish_timeout_s: float = 5.0) -> None:
        self._partitions = partitions
        self._capacity = capacity
        self._publish_timeout_s = publish_timeout_s
        self.lock = threading.RLock()
        self.moves = 0  # how often members came or went: their shares are dealt anew then
        self._room = threading.Condition(self.lock)
        self._logs: dict[Partition, _Log] = {}
        self._groups: dict[str, _Group] = {}
        self._closed = False

    def publish(self, topic: str, key: str, value: bytes, headers: Headers = ()) -> None:
        check_size(topic, value)
        partition = Partition(topic, zlib.crc32(key.encode()) % self._partitions)
        with self.lock:
            log = self._log(partition)
            if topic.startswith(NEWS) and not self._is_read(topic):
                log.drop_until(log.end - self._capacity + 1)
            room = self._room.wait_for(
                lambda: self._closed or len(log.records) < self._capacity, self._publish_timeout_s
            )
            if self._closed:
                raise BusUnavailable("The bus is closed.")
            if not room:
                raise BusUnavailable(f"{topic} holds {self._capacity} records that no reader has done.", "Try later.")
            log.records.append(Delivery(partition, log.end, key, value, headers, time.time()))
            for group in self._groups.values():
                for member in group.members:
                    if partition in member.assignment():
                        member.news.notify()

    def subscribe(
        self,
        topics: Sequence[str],
        group: str,
        *,
        on_assigned: Moved | None = None,
        on_revoked: Moved | None = None,
        urgent: bool = True,
    ) -> MemorySubscription:
        with self.lock:
            if self._closed:
                raise BusUnavailable("The bus is closed.")
            joined = self._groups.setdefault(group, _Group())
            joined.topics.update(topics)
            member = MemorySubscription(self, group, tuple(topics), on_assigned, on_revoked)
            joined.members.append(member)
            self._deal_anew()
            return member

    def ping(self) -> None:
        if self._closed:
            raise BusUnavailable("The bus is closed.")

    def close(self) -> None:
        with self.lock:
            self._closed = True
            self._deal_anew()
            for group in self._groups.values():
                group.members.clear()
            self._room.notify_all()

    def backlog(self, topic: str, group: str) -> int:
        """Records of a topic that a group has not committed."""
        with self.lock:
            partitions = [Partition(topic, number) for number in range(self._partitions)]
            return sum(self._log(part).end - self.committed(group, part) for part in partitions)

    def assigned(self, member: MemorySubscription) -> frozenset[Partition]:
        """The partitions of a member: those of each topic are dealt round to the members that read it."""
        group = self._groups[member.group]
        dealt: set[Partition] = set()
        for topic in member.topics if member in group.members else ():
            readers = [other for other in group.members if topic in other.topics]
            place = readers.index(member)
            dealt |= {Partition(topic, number) for number in range(place, self._partitions, len(readers))}
        return frozenset(dealt)

    def committed(self, group: str, partition: Partition) -> int:
        """The offset that a group reads next in a partition."""
        known = self._groups.get(group, _Group()).committed.get(partition, 0)
        return max(known, self._log(partition).first)

    def record(self, partition: Partition, offset: int) -> Delivery | None:
        """The record at an offset, if it is there by now."""
        log = self._log(partition)
        return log.records[offset - log.first] if log.first <= offset < log.end else None

    def commit(self, member: MemorySubscription, positions: Mapping[Partition, int]) -> None:
        """Store positions for a member that owns the partitions, and forget records that every group has done."""
        with self.lock:
            group = self._groups[member.group]
            lost = positions.keys() - self.assigned(member)
            if lost:
                raise CommitRefused(f"{member.group} lost {', '.join(map(str, sorted(lost)))} before the commit.")
            for partition, offset in positions.items():
                group.committed[partition] = offset
                readers = [other for other in self._groups.values() if partition.topic in other.topics]
                self._log(partition).drop_until(min(reader.committed.get(partition, 0) for reader in readers))
            self._room.notify_all()

    def leave(self, member: MemorySubscription) -> None:
        """Take a member out of its group; the others take over its partitions."""
        with self.lock:
            members = self._groups[member.group].members
            if member in members:
                members.remove(member)
            self._deal_anew()

    def _deal_anew(self) -> None:
        """Have every member look at its share again."""
        self.moves += 1
        for group in self._groups.values():
            for member in group.members:
                member.news.notify()

    def _is_read(self, topic: str) -> bool:
        return any(topic in member.topics for group in self._groups.values() for member in group.members)

    def _log(self, partition: Partition) -> _Log:
        return self._logs.setdefault(partition, _Log())


class MemorySubscription:
    """A Subscription of a MemoryBus."""

    def __init__(
        self, bus: MemoryBus, group: str, topics: tuple[str, ...], on_assigned: Moved | None, on_revoked: Moved | None
    ) -> None:
        self.group = group
        self.topics = topics
        self.news = threading.Condition(bus.lock)
        self._bus = bus
        self._moves_seen = -1
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._positions: dict[Partition, int] = {}
        self._paused: set[Partition] = set()
        self._turn = 0

    def poll(self, timeout_s: float, max_records: int = 1) -> list[Delivery]:
        until = time.monotonic() + timeout_s
        while True:
            if self._moves_seen != self._bus.moves:
                self._follow_assignment()
            with self._bus.lock:
                if self._moves_seen != self._bus.moves:
                    continue
                if found := self._take(max_records):
                    return found
                remaining = until - time.monotonic()
                if remaining <= 0:
                    return []
                self.news.wait(remaining)

    def commit(self, positions: Mapping[Partition, int]) -> None:
        self._bus.commit(self, positions)

    def assignment(self) -> frozenset[Partition]:
        return frozenset(self._positions)

    def pause(self, partitions: Collection[Partition]) -> None:
        self._paused |= set(partitions) & self._positions.keys()

    def resume(self, partitions: Collection[Partition]) -> None:
        self._paused -= set(partitions)

    def close(self) -> None:
        self._bus.leave(self)
        self._positions.clear()

    def _follow_assignment(self) -> None:
        with self._bus.lock:
            self._moves_seen = self._bus.moves
            wanted = self._bus.assigned(self)
            lost, gained = frozenset(self._positions.keys() - wanted), wanted - self._positions.keys()
            for partition in lost:
                del self._positions[partition]
            self._paused -= lost
            self._positions |= {partition: self._bus.committed(self.group, partition) for partition in gained}
        try:
            if lost and self._on_revoked is not None:
                self._on_revoked(lost)
            if gained and self._on_assigned is not None:
                self._on_assigned(gained)
        except Exception as error:
            raise ListenerFailed(f"The reader of {self.group} failed as its partitions changed: {error}.") from error

    def _take(self, max_records: int) -> list[Delivery]:
        """Records from the readable partitions, beginning with another one each time so that none starves."""
        readable = sorted(self._positions.keys() - self._paused)
        self._turn += 1
        found: list[Delivery] = []
        for place in range(len(readable)):
            partition = readable[(place + self._turn) % len(readable)]
            while len(found) < max_records:
                record = self._bus.record(partition, self._positions[partition])
                if record is None:
                    break
                found.append(record)
                self._positions[partition] = record.offset + 1
        return found
