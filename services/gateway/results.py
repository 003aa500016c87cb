"""Reads the topic of results: jobs of all services are counted in this gateway's metrics, and the ends of those that
came over the bus are told by webhook. Gateways share the topic, so their numbers add up, and each end is told by one.
"""

from __future__ import annotations

import logging
import threading
import time

from pydantic import ValidationError

from services.gateway.metrics import Metrics
from services.gateway.webhooks import Webhooks
from shared.bus.port import Bus, Delivery, Subscription
from shared.errors import TransientError
from shared.schemas.exchange import RESULTS, Result

log = logging.getLogger(__name__)
GROUP = "editx-gateway"
POLL_S = 0.5
RECORDS_MAX = 200
REMEMBERED_MAX = 10_000
AGAIN_S = 5.0


class ResultsReader:
    """Reads results in a thread, from `start` until `stop`; those of jobs that ended before `start` do not count."""

    def __init__(self, bus: Bus, metrics: Metrics, webhooks: Webhooks) -> None:
        self._bus = bus
        self._metrics = metrics
        self._webhooks = webhooks
        self._began = time.time()
        self._counted: dict[str, None] = {}  # job ids in order, since a result may be told twice
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="results", daemon=True)

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
                log.warning("results are not read for now: %s", error)
                self._stop.wait(AGAIN_S)
                continue
            try:
                while not self._stop.is_set():
                    self._read(reader)
            except Exception:
                log.exception("results are not read for now")
                self._stop.wait(AGAIN_S)
            finally:
                reader.close()

    def _read(self, reader: Subscription) -> None:
        deliveries = reader.poll(POLL_S, max_records=RECORDS_MAX)
        for delivery in deliveries:
            try:
                self._take(delivery)
            except Exception:
                log.exception("the result at %s offset %d was not taken", delivery.partition, delivery.offset)
        try:
            if deliveries:
                reader.commit({delivery.partition: delivery.offset + 1 for delivery in deliveries})
        except TransientError as error:
            log.warning("results that were read are not committed: %s", error)

    def _take(self, delivery: Delivery) -> None:
        try:
            result = Result.model_validate_json(delivery.value)
        except ValidationError as error:
            log.warning("not a result, at %s offset %d: %s", delivery.partition, delivery.offset, error)
            return
        if result.state == "accepted":
            return
        self._webhooks.heard(result)
        if result.finished_at < self._began or result.job_id in self._counted:
            return
        self._counted[result.job_id] = None
        if len(self._counted) > REMEMBERED_MAX:
            del self._counted[next(iter(self._counted))]
        self._metrics.count(result)
