"""A Bus on a broker that speaks the Kafka protocol, through kafka-python 3.

Producing waits for all replicas. It may send a record twice, which does no harm here; a broker's memory of what was
sent (idempotent producing) would be one more thing that can be wrong. In Tansu it is: a record that was being written
while the broker was killed counts as written when it is sent again, and is lost. A group's partitions move one by one
(cooperative sticky). A commit is refused here when the partition was taken away: brokers accept such commits and would
rewind the group. Topics are made beforehand (`create_topics`), never by publishing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from kafka import KafkaConsumer, KafkaProducer
from kafka.admin import KafkaAdminClient, OffsetSpec
from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import CommitFailedError, IllegalStateError, KafkaError, TopicAlreadyExistsError
from kafka.protocol.admin import DescribeGroupsRequest
from kafka.structs import OffsetAndMetadata, TopicPartition

from shared.bus.leadership import LeaderWatch
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
from shared.errors import UserError
from shared.topology import broker_group

log = logging.getLogger(__name__)
JOIN_WAIT_S = 0.5
POSITION_WAIT_S = 0.05
IDLE_AFTER_S = 1.0
NO_HURRY_MS = 250
"""How long a question for records may wait at the broker where they are not urgent."""


@dataclass(frozen=True)
class KafkaSettings:
    """How long this client waits. They may be given in the URL's query, in milliseconds.

    `idle_wait_ms` is for brokers that need a short `fetch_max_wait_ms`: a reader that got nothing for a second asks no
    more often than this.
    """

    session_timeout_ms: int = 30_000
    heartbeat_interval_ms: int = 3_000
    max_poll_interval_ms: int = 300_000
    request_timeout_ms: int = 10_000
    delivery_timeout_ms: int = 20_000
    commit_timeout_ms: int = 5_000
    fetch_max_wait_ms: int = 250
    idle_wait_ms: int = 0
    security_protocol: str = "PLAINTEXT"


def connect(url: str) -> KafkaBus:
    """kafka://host:port[,host:port][?session_timeout_ms=...]"""
    parts = urlsplit(url)
    names = KafkaSettings.__dataclass_fields__
    query = dict(parse_qsl(parts.query))
    if unknown := query.keys() - names.keys():
        raise UserError(f"Unknown in {url}: {', '.join(sorted(unknown))}.", f"Known: {', '.join(names)}.")
    given: dict[str, Any] = {name: value if names[name].type == "str" else int(value) for name, value in query.items()}
    return KafkaBus(parts.netloc.split(","), KafkaSettings(**given))


class KafkaBus:
    """A Bus on the brokers `servers` ("host:port"). The producer is made when something is first published."""

    system = "kafka"

    def __init__(self, servers: Sequence[str], settings: KafkaSettings | None = None) -> None:
        self._servers = list(servers)
        self._settings = settings or KafkaSettings()
        self._lock = threading.Lock()
        self._producer: KafkaProducer | None = None
        self._admin: KafkaAdminClient | None = None
        self._admin_lock = threading.Lock()
        self._subscriptions: list[KafkaSubscription] = []
        self._closed = False

    def publish(self, topic: str, key: str, value: bytes, headers: Headers = ()) -> None:
        check_size(topic, value)
        try:
            future = self._make_producer().send(topic, key=key.encode(), value=value, headers=list(headers))
            future.get(timeout=self._settings.delivery_timeout_ms / 1000 + 1)
        except (KafkaError, TimeoutError) as error:
            raise _unavailable(self._servers, error) from error

    def subscribe(
        self,
        topics: Sequence[str],
        group: str,
        *,
        on_assigned: Moved | None = None,
        on_revoked: Moved | None = None,
        urgent: bool = True,
    ) -> KafkaSubscription:
        if self._closed:
            raise BusUnavailable("The bus is closed.")
        settings = self._settings
        if not urgent:
            settings = replace(settings, fetch_max_wait_ms=max(settings.fetch_max_wait_ms, NO_HURRY_MS))
        subscription = KafkaSubscription(self._servers, settings, topics, group, on_assigned, on_revoked)
        self._subscriptions.append(subscription)
        return subscription

    def create_topics(
        self, partitions: Mapping[str, int], *, replication: int = 1, configs: Mapping[str, str] | None = None
    ) -> None:
        """Make the topics that are missing, each with its number of partitions. Raises BusUnavailable."""
        with self._administering() as admin:
            missing = partitions.keys() - set(admin.list_topics())
            for topic in sorted(missing):
                facts = {"num_partitions": partitions[topic], "replication_factor": replication}
                try:
                    admin.create_topics({topic: {**facts, "configs": dict(configs or {})}})
                except TopicAlreadyExistsError:
                    log.info("the topic %s was made by somebody else", topic)

    def backlog(self, topic: str, group: str) -> int:
        """Records of a topic that a group has not committed: its lag. Raises BusUnavailable."""
        reader = broker_group(group, [topic])
        with self._administering() as admin:
            [described] = admin.describe_topics([topic])
            parts = [TopicPartition(topic, part["partition_index"]) for part in described["partitions"]]
            ends = admin.list_partition_offsets(dict.fromkeys(parts, OffsetSpec.LATEST))
            begins = admin.list_partition_offsets(dict.fromkeys(parts, OffsetSpec.EARLIEST))
            committed = admin.list_group_offsets({reader: parts})[reader]
        return sum(ends[part].offset - max(committed[part].offset, begins[part].offset) for part in parts)

    def ping(self) -> None:
        with self._administering() as admin:
            admin.list_topics()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            producer, self._producer = self._producer, None
        for subscription in self._subscriptions:
            subscription.close()
        if producer is not None:
            producer.close(timeout=self._settings.commit_timeout_ms / 1000)
        self._drop(self._admin)

    @contextmanager
    def _administering(self) -> Iterator[KafkaAdminClient]:
        """The bus's one admin client, which threads may share; made anew after it failed."""
        admin = None
        try:
            with self._admin_lock:
                if self._closed:
                    raise BusUnavailable("The bus is closed.")
                if self._admin is None:
                    self._admin = _admin(self._servers, self._settings)
                admin = self._admin
            yield admin
        except KafkaError as error:
            self._drop(admin)
            raise _unavailable(self._servers, error) from error

    def _drop(self, admin: KafkaAdminClient | None) -> None:
        """Close an admin client; the next call makes another."""
        with self._admin_lock:
            if admin is not None and self._admin is admin:
                self._admin = None
        if admin is not None:
            admin.close()

    def _make_producer(self) -> KafkaProducer:
        with self._lock:
            if self._closed:
                raise BusUnavailable("The bus is closed.")
            if self._producer is None:
                self._producer = KafkaProducer(
                    bootstrap_servers=self._servers,
                    allow_auto_create_topics=False,
                    acks="all",
                    enable_idempotence=False,
                    delivery_timeout_ms=self._settings.delivery_timeout_ms,
                    request_timeout_ms=self._settings.request_timeout_ms,
                    bootstrap_timeout_ms=self._settings.request_timeout_ms,
                    max_block_ms=self._settings.request_timeout_ms,
                    reconnect_backoff_max_ms=1_000,
                    security_protocol=self._settings.security_protocol,
                )
            return self._producer


class KafkaSubscription(ConsumerRebalanceListener):  # type: ignore[misc]
    """A Subscription: one consumer of a group, used by one thread."""

    def __init__(
        self,
        servers: list[str],
        settings: KafkaSettings,
        topics: Sequence[str],
        group: str,
        on_assigned: Moved | None,
        on_revoked: Moved | None,
    ) -> None:
        self._servers = servers
        self._settings = settings
        self._group = broker_group(group, topics)
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._assigned: frozenset[Partition] = frozenset()
        self._closed = False
        self._failure: Exception | None = None
        self._busy_at = time.monotonic()
        self._ask_at = 0.0
        try:
            self._consumer = KafkaConsumer(
                bootstrap_servers=servers,
                group_id=self._group,
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                allow_auto_create_topics=False,
                partition_assignment_strategy=[CooperativeStickyAssignor],
                session_timeout_ms=settings.session_timeout_ms,
                heartbeat_interval_ms=settings.heartbeat_interval_ms,
                max_poll_interval_ms=settings.max_poll_interval_ms,
                request_timeout_ms=settings.request_timeout_ms,
                bootstrap_timeout_ms=settings.request_timeout_ms,
                fetch_max_wait_ms=settings.fetch_max_wait_ms,
                reconnect_backoff_max_ms=1_000,
                metadata_max_age_ms=30_000,
                security_protocol=settings.security_protocol,
            )
            self._consumer.subscribe(list(topics), listener=self)
        except KafkaError as error:
            raise _unavailable(servers, error) from error
        self._leadership = LeaderWatch(self._consumer._coordinator, self._members, settings.session_timeout_ms / 1000)

    def poll(self, timeout_s: float, max_records: int = 1) -> list[Delivery]:
        self._free_parked_records()
        wait_s = self._least_wait_s()
        if not wait_s and self._settings.idle_wait_ms and time.monotonic() - self._busy_at > IDLE_AFTER_S:
            rest_s = max(self._ask_at - time.monotonic(), 0.0)
            time.sleep(min(rest_s, timeout_s))
            if rest_s > timeout_s:
                return []
            timeout_s = min(timeout_s, self._settings.fetch_max_wait_ms / 1000)
            self._ask_at = time.monotonic() + self._settings.idle_wait_ms / 1000
        wait_s = max(timeout_s, wait_s)
        batches: dict[TopicPartition, list[Any]] = {}
        try:
            batches = self._consumer.poll(timeout_ms=int(wait_s * 1000), max_records=max_records)
            self._leadership.check()
        except (KafkaError, OSError) as error:
            log.warning("a poll of %s failed: %s", ", ".join(self._servers), error)
        if self._failure is not None:
            raise ListenerFailed(
                f"The reader of {self._group} failed as its partitions changed: {self._failure}."
            ) from self._failure
        if batches:
            self._busy_at = time.monotonic()
        return [_delivery(record) for records in batches.values() for record in records]

    def commit(self, positions: Mapping[Partition, int]) -> None:
        if self._closed:
            raise CommitRefused("The reader has left its group.")
        if lost := positions.keys() - self._assigned:
            raise CommitRefused(f"{', '.join(map(str, sorted(lost)))} moved to another reader before the commit.")
        offsets = {_kafka(partition): OffsetAndMetadata(offset, "", -1) for partition, offset in positions.items()}
        try:
            self._consumer.commit(offsets, timeout_ms=self._settings.commit_timeout_ms)
        except CommitFailedError as error:
            raise CommitRefused(f"The broker refused a commit: {error}") from error
        except KafkaError as error:
            raise _unavailable(self._servers, error) from error

    def assignment(self) -> frozenset[Partition]:
        return self._assigned

    def pause(self, partitions: Collection[Partition]) -> None:
        self._each(self._consumer.pause, partitions)

    def resume(self, partitions: Collection[Partition]) -> None:
        self._each(self._consumer.resume, partitions)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._consumer.close(autocommit=False, timeout_ms=self._settings.commit_timeout_ms)

    def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Called by the consumer inside `poll` with the partitions that are new."""
        gained = _partitions(assigned)
        self._assigned |= gained
        self._tell(self._on_assigned, gained)

    def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Called by the consumer inside `poll` or `close` with the partitions that go elsewhere."""
        lost = _partitions(revoked)
        self._assigned -= lost
        self._tell(self._on_revoked, lost)

    def on_partitions_lost(self, lost: Collection[TopicPartition]) -> None:
        """Called instead of the above when the membership itself was lost."""
        self.on_partitions_revoked(lost)

    def _tell(self, listener: Moved | None, moved: frozenset[Partition]) -> None:
        """Call the reader's own listener. What it raises is kept for `poll`: the client would take it for its own."""
        if not moved or listener is None or self._closed:
            return
        try:
            listener(moved)
        except Exception as error:
            log.exception("the reader of %s failed as its partitions changed", self._group)
            self._failure = error

    def _members(self) -> frozenset[str]:
        """The ids of the group's members, asked on a connection of its own: the consumer's waits in its rebalance.

        The admin's `describe_groups` cannot read Tansu's answer with access rights in it, so they are not asked for.
        """
        admin = _admin(self._servers, self._settings)

        async def describe() -> Any:
            coordinators = await admin._find_coordinator_ids([self._group])
            request = DescribeGroupsRequest(groups=[self._group], max_version=2)
            return await admin._manager.send(request, node_id=coordinators[self._group])

        try:
            groups = admin._manager.run(describe).groups
        finally:
            admin.close()
        return frozenset(member.member_id for group in groups for member in group.members)

    def _least_wait_s(self) -> float:
        """How long a poll must last for the client to get anywhere: joining starts afresh with every poll."""
        if self._consumer._coordinator.need_rejoin():
            return JOIN_WAIT_S
        return 0.0 if self._consumer._subscription.has_all_fetch_positions() else POSITION_WAIT_S

    def _free_parked_records(self) -> None:
        """Let the client hand out what it fetched for a partition that was paused and is resumed.

        kafka-python 3.0.12 parks such records and takes them back only while its current batch is None, but a batch
        that is used up stays in place while other partitions are idle: the records would never come.
        """
        fetcher = self._consumer._fetcher
        if fetcher._next_partition_records is not None and not fetcher._next_partition_records:
            fetcher._next_partition_records = None

    def _each(self, change: Any, partitions: Collection[Partition]) -> None:
        wanted = [_kafka(partition) for partition in partitions if partition in self._assigned]
        try:
            if wanted:
                change(*wanted)
        except (IllegalStateError, KeyError) as error:
            log.warning("the assignment changed meanwhile: %s", error)


def _admin(servers: list[str], settings: KafkaSettings) -> KafkaAdminClient:
    return KafkaAdminClient(
        bootstrap_servers=servers,
        request_timeout_ms=settings.request_timeout_ms,
        bootstrap_timeout_ms=settings.request_timeout_ms,
        security_protocol=settings.security_protocol,
    )


def _delivery(record: Any) -> Delivery:
    return Delivery(
        partition=Partition(record.topic, record.partition),
        offset=record.offset,
        key=(record.key or b"").decode("utf-8", "replace"),
        value=record.value or b"",
        headers=tuple((name, value or b"") for name, value in record.headers or ()),
        published_at=record.timestamp / 1000,
    )


def _kafka(partition: Partition) -> TopicPartition:
    return TopicPartition(partition.topic, partition.number)


def _partitions(found: Collection[TopicPartition]) -> frozenset[Partition]:
    return frozenset(Partition(part.topic, part.partition) for part in found)


def _unavailable(servers: Sequence[str], error: BaseException) -> BusUnavailable:
    return BusUnavailable(
        f"The broker at {', '.join(servers)} did not answer: {error or type(error).__name__}.", "Check that it runs."
    )
