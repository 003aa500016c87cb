"""The bus's promises."""

import time
import uuid

import pytest
from kafka import KafkaConsumer

from shared.bus.kafka import connect
from shared.bus.port import (
    RECORD_BYTES_MAX,
    Bus,
    CommitRefused,
    Delivery,
    ListenerFailed,
    Partition,
    RecordTooLarge,
    Subscription,
)
from tests.fixtures.servers import shared_servers

PATIENCE_S = 45.0


@pytest.fixture
def topic() -> str:
    return f"editx.test.{uuid.uuid4().hex[:8]}"


@pytest.fixture
def group() -> str:
    return f"group-{uuid.uuid4().hex[:8]}"


def read(reader: Subscription, count: int, patience_s: float = PATIENCE_S) -> list[Delivery]:
    found: list[Delivery] = []
    until = time.monotonic() + patience_s
    while len(found) < count and time.monotonic() < until:
        found += reader.poll(0.1, max_records=count - len(found))
    return found


def commit(reader: Subscription, records: list[Delivery]) -> None:
    reader.commit({record.partition: record.offset + 1 for record in records})


def test_a_record_arrives_with_its_key_value_and_headers(bus: Bus, topic: str, group: str) -> None:
    bus.publish(topic, "job-1", b"work", (("traceparent", b"00-1"), ("attempt", b"1")))
    reader = bus.subscribe([topic], group)
    [record] = read(reader, 1)
    assert (record.topic, record.key, record.value) == (topic, "job-1", b"work")
    assert dict(record.headers) == {"traceparent": b"00-1", "attempt": b"1"}
    assert record.partition in reader.assignment()
    reader.close()


def test_records_of_one_key_keep_their_order_in_one_partition(bus: Bus, topic: str, group: str) -> None:
    for number in range(20):
        for key in ("a", "b", "c"):
            bus.publish(topic, key, f"{key}{number}".encode())
    reader = bus.subscribe([topic], group)
    records = read(reader, 60)
    for key in ("a", "b", "c"):
        mine = [record for record in records if record.key == key]
        assert [record.value for record in mine] == [f"{key}{number}".encode() for number in range(20)]
        assert len({record.partition for record in mine}) == 1
        assert [record.offset for record in mine] == sorted(record.offset for record in mine)
    reader.close()


def test_a_reader_that_leaves_without_a_commit_causes_redelivery(bus: Bus, topic: str, group: str) -> None:
    bus.publish(topic, "job-1", b"work")
    first = bus.subscribe([topic], group)
    assert [record.value for record in read(first, 1)] == [b"work"]
    first.close()
    second = bus.subscribe([topic], group)
    assert [record.value for record in read(second, 1)] == [b"work"]
    second.close()


def test_what_is_committed_does_not_come_again(bus: Bus, topic: str, group: str) -> None:
    for number in range(3):
        bus.publish(topic, "job-1", str(number).encode())
    first = bus.subscribe([topic], group)
    records = read(first, 3)
    commit(first, records[:2])
    first.close()
    second = bus.subscribe([topic], group)
    assert [record.value for record in read(second, 1)] == [b"2"]
    second.close()


def test_groups_do_not_take_records_from_each_other(bus: Bus, topic: str, group: str) -> None:
    bus.publish(topic, "job-1", b"work")
    one, other = bus.subscribe([topic], group), bus.subscribe([topic], f"{group}-other")
    assert len(read(one, 1)) == len(read(other, 1)) == 1
    one.close()
    other.close()


def test_two_members_share_the_partitions_and_a_leaver_hands_its_share_over(bus: Bus, topic: str, group: str) -> None:
    for number in range(40):
        bus.publish(topic, f"job-{number}", str(number).encode())
    lost: list[Partition] = []
    one = bus.subscribe([topic], group, on_revoked=lost.extend)
    alone = frozenset[Partition]()
    until = time.monotonic() + PATIENCE_S
    while not alone and time.monotonic() < until:
        one.poll(0.1, max_records=1)
        alone = one.assignment()
    two = bus.subscribe([topic], group)
    while time.monotonic() < until and not (one.assignment() | two.assignment() == alone and two.assignment()):
        one.poll(0.1)
        two.poll(0.1)
    assert not one.assignment() & two.assignment()
    assert set(lost) >= two.assignment()
    two.close()
    while time.monotonic() < until and one.assignment() != alone:
        one.poll(0.1)
    assert one.assignment() == alone
    one.close()


def test_a_paused_partition_gives_nothing_until_it_is_resumed(bus: Bus, topic: str, group: str) -> None:
    bus.publish(topic, "job-1", b"first")
    reader = bus.subscribe([topic], group)
    [first] = read(reader, 1)
    reader.pause([first.partition])
    bus.publish(topic, "job-1", b"second")
    assert read(reader, 1, patience_s=0.5) == []
    reader.resume([first.partition])
    assert [record.value for record in read(reader, 1)] == [b"second"]
    reader.close()


def test_a_commit_after_leaving_is_refused_or_changes_nothing_that_others_did(bus: Bus, topic: str, group: str) -> None:
    bus.publish(topic, "job-1", b"work")
    gone = bus.subscribe([topic], group)
    [record] = read(gone, 1)
    gone.close()
    with pytest.raises(CommitRefused):
        commit(gone, [record])


def test_a_poll_without_records_returns_after_its_timeout(bus: Bus, topic: str, group: str) -> None:
    bus.publish(topic, "job-1", b"work")
    reader = bus.subscribe([topic], group)
    read(reader, 1)
    began = time.monotonic()
    assert reader.poll(0.2) == []
    assert 0.15 <= time.monotonic() - began < 5.0
    reader.close()


def test_a_subscription_reads_several_topics(bus: Bus, topic: str, group: str) -> None:
    bus.publish(topic, "job-1", b"interactive")
    bus.publish(f"{topic}.batch", "job-2", b"batch")
    reader = bus.subscribe([topic, f"{topic}.batch"], group)
    assert {record.value for record in read(reader, 2)} == {b"interactive", b"batch"}
    reader.close()


def test_the_backlog_counts_what_a_group_has_not_committed(bus: Bus, topic: str, group: str) -> None:
    for number in range(5):
        bus.publish(topic, f"job-{number}", b"work")
    reader = bus.subscribe([topic], group)
    records = read(reader, 5)
    assert bus.backlog(topic, group) == 5
    commit(reader, sorted(records, key=lambda record: record.offset))
    assert bus.backlog(topic, group) == 0
    reader.close()


def test_a_listener_that_fails_comes_out_of_the_poll_and_its_partitions_go_elsewhere(
    bus: Bus, topic: str, group: str
) -> None:
    def fail(_: frozenset[Partition]) -> None:
        raise ValueError("a defect")

    bus.publish(topic, "job-1", b"work")
    failing = bus.subscribe([topic], group, on_assigned=fail)
    with pytest.raises(ListenerFailed, match="a defect"):
        read(failing, 1)
    failing.close()
    other = bus.subscribe([topic], group)
    assert [record.value for record in read(other, 1)] == [b"work"]
    other.close()


def test_a_record_that_is_too_large_is_refused(bus: Bus, topic: str) -> None:
    with pytest.raises(RecordTooLarge, match=topic):
        bus.publish(topic, "job-1", bytes(RECORD_BYTES_MAX + 1))


def test_the_bus_answers_a_ping_and_closes_twice(bus: Bus) -> None:
    bus.ping()
    bus.close()
    bus.close()


def test_a_reader_without_work_asks_seldom_and_still_gets_what_comes(
    topic: str, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = connect(f"kafka://{shared_servers().kafka}?fetch_max_wait_ms=20&idle_wait_ms=200")
    bus.create_topics({topic: 1})
    asked = [0]
    poll = KafkaConsumer.poll

    def counted(consumer: KafkaConsumer, *arguments: object, **options: object) -> object:
        asked[0] += 1
        return poll(consumer, *arguments, **options)

    try:
        bus.publish(topic, "a", b"first")
        reader = bus.subscribe([topic], group)
        assert [record.value for record in read(reader, 1)] == [b"first"]
        assert read(reader, 1, patience_s=1.5) == []
        monkeypatch.setattr(KafkaConsumer, "poll", counted)
        assert read(reader, 1, patience_s=1.0) == []
        assert 3 <= asked[0] <= 6
        bus.publish(topic, "a", b"second")
        assert [record.value for record in read(reader, 1)] == [b"second"]
        reader.close()
    finally:
        bus.close()
