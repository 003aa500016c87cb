"""What the bus inside the process does beyond the contract: its bounds."""

import threading
import time

import pytest

from shared.bus.memory import MemoryBus
from shared.bus.port import BusUnavailable

WORK = "editx.tokenize"


def small_bus(timeout_s: float = 0.1) -> MemoryBus:
    return MemoryBus(partitions=1, capacity=3, publish_timeout_s=timeout_s)


def fill(bus: MemoryBus, topic: str, count: int = 3) -> None:
    for number in range(count):
        bus.publish(topic, "job", str(number).encode())


def test_a_full_partition_refuses_work_rather_than_losing_any() -> None:
    bus = small_bus()
    fill(bus, WORK)
    with pytest.raises(BusUnavailable, match="3 records"):
        bus.publish(WORK, "job", b"one too many")
    assert bus.backlog(WORK, "anybody") == 3


def test_a_publisher_waits_for_room() -> None:
    bus = small_bus(timeout_s=10.0)
    fill(bus, WORK)
    reader = bus.subscribe([WORK], "group")

    def read() -> None:
        [record] = reader.poll(5.0)
        reader.commit({record.partition: record.offset + 1})

    later = threading.Timer(0.1, read)
    later.start()
    began = time.monotonic()
    bus.publish(WORK, "job", b"patient")
    later.join()
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize("topic", ["editx.dlq.failed", "editx.results"])
def test_news_that_nobody_reads_keep_the_latest(topic: str) -> None:
    bus = small_bus()
    fill(bus, topic, 10)
    reader = bus.subscribe([topic], "late")
    assert [record.value for record in reader.poll(1.0, max_records=10)] == [b"7", b"8", b"9"]
    with pytest.raises(BusUnavailable):
        fill(bus, topic, 10)


def test_a_closed_bus_refuses_everything() -> None:
    bus = small_bus()
    bus.close()
    for use in (bus.ping, lambda: bus.publish(WORK, "job", b""), lambda: bus.subscribe([WORK], "group")):
        with pytest.raises(BusUnavailable):
            use()
