"""Records that the broker was writing when it was killed."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from editx.stack.process import free_ports
from editx.stack.stack import SPAN, Options, Stack

RESTARTS = 8
PATIENCE_S = 30.0


def test_no_acknowledged_record_is_lost_when_the_broker_is_killed(tmp_path: Path) -> None:
    stack = Stack(tmp_path, Options(port=free_ports(SPAN), inference="null", services=(), gateway=False))
    acknowledged: list[str] = []
    over = threading.Event()
    stack.up()
    bus = stack.bus()

    def publish() -> None:
        while not over.is_set():
            key = f"record-{len(acknowledged)}"
            bus.publish("records", key, b"x")
            acknowledged.append(key)

    try:
        bus.create_topics({"records": 1})
        publisher = threading.Thread(target=publish)
        publisher.start()
        for _ in range(RESTARTS):
            time.sleep(0.2)
            stack.restart("broker", kill=True)
        over.set()
        publisher.join(PATIENCE_S)
        reader = bus.subscribe(["records"], "reader")
        found: set[str] = set()
        until = time.monotonic() + PATIENCE_S
        while not found.issuperset(acknowledged) and time.monotonic() < until:
            found |= {record.key for record in reader.poll(0.5, max_records=500)}
        assert sorted(set(acknowledged) - found) == []
        assert len(acknowledged) > RESTARTS
    finally:
        over.set()
        bus.close()
        stack.down()
