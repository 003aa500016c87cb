"""Counts the jobs of all services in a gateway's metrics, from the topic of results. Gateways share the topic, so their
numbers add up. Knows nothing about how results are told to anybody else.
"""

from __future__ import annotations

import logging
import threading
import time

from pydantic import ValidationError

from services.gateway.metrics import Metrics
from shared.bus.port import Bus, Delivery, Subscription
from shared.errors import TransientError
from shared.schemas.exchange import RESULTS, Result

log = logging.getLogger(__name__)
GROUP = "editx-gateway-metrics"
POLL_S = 0.5
RECORDS_MAX = 200
REMEMBERED_MAX = 10_000
AGAIN_S = 5.0


class MetricsReader:
    """Reads results in a thread, from `start` until `stop`; those of jobs that ended before `start` do not count."""

    def __init__(self, bus: Bus, metrics: Metrics) -> None:
        self._bus = bus
        self._metrics = metrics
        self._began = time.time()
        self._counted: dict[str, None] = {}  # job ids in order, since a result may be told twice
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        """Begin reading. A bus that does not answer is tried again."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Safe to call when it was never started."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10.0)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                reader = self._bus.subscribe([RESULTS], GROUP)
            except TransientError as error:
                log.warning("results are not counted for now: %s", error)
                self._stop.wait(AGAIN_S)
                continue
            try:
                while not self._stop.is_set():
                    self._read(reader)
            finally:
                reader.close()

    def _read(self, reader: Subscription) -> None:
        deliveries = reader.poll(POLL_S, max_records=RECORDS_MAX)
        for delivery in deliveries:
            self._count(delivery)
        try:
            if deliveries:
                reader.commit({delivery.partition: delivery.offset + 1 for delivery in deliveries})
        except TransientError as error:
            log.warning("counted results are not committed: %s", error)

    def _count(self, delivery: Delivery) -> None:
        try:
            result = Result.model_validate_json(delivery.value)
        except ValidationError as error:
            log.warning("not a result, at %s offset %d: %s", delivery.partition, delivery.offset, error)
            return
        if result.finished_at < self._began or result.job_id in self._counted:
            return
        self._counted[result.job_id] = None
        if len(self._counted) > REMEMBERED_MAX:
            del self._counted[next(iter(self._counted))]
        self._metrics.count(result)
