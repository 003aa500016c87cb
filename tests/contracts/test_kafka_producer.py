"""What only the Kafka adapter can get wrong: a producer that its broker once failed is unusable for good."""

from __future__ import annotations

import uuid

import pytest
from kafka.errors import UnknownError

from shared.bus.kafka import KafkaBus
from shared.bus.port import BusUnavailable
from tests.fixtures.servers import shared_servers


def test_a_producer_that_cannot_go_on_is_made_anew() -> None:
    bus = KafkaBus([shared_servers().kafka])
    topic = f"test-{uuid.uuid4().hex}"
    bus.create_topics({topic: 1})
    bus.publish(topic, "key", b"one")
    broken = bus._producer
    assert broken is not None
    broken._transaction_manager.transition_to_fatal_error(UnknownError())
    with pytest.raises(BusUnavailable):
        bus.publish(topic, "key", b"two")
    bus.publish(topic, "key", b"three")
    assert bus._producer is not broken
    bus.close()
