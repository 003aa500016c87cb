"""The parts of one gateway, put together: what every route works with."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from dataclasses import dataclass, field

from services.gateway.access import Admission, Keys, Listeners
from services.gateway.backend import Backend
from services.gateway.metrics import Metrics
from services.gateway.recordings import Recordings
from services.gateway.results import ResultsReader
from services.gateway.settings import GatewaySettings
from services.gateway.threads import blocking
from services.gateway.voices import Voices
from services.gateway.webhooks import Webhooks
from shared.errors import EditxError
from shared.recordings import UPLOADS

log = logging.getLogger(__name__)
TIDY_EVERY_S = 600.0
BATCHES = "batches/"


@dataclass(frozen=True, eq=False)
class Gateway:
    """The parts that routes use."""

    backend: Backend
    settings: GatewaySettings
    metrics: Metrics
    results: ResultsReader
    keys: Keys
    admission: Admission
    voices: Voices
    recordings: Recordings
    webhooks: Webhooks
    listeners: Listeners
    speaking: asyncio.Semaphore
    in_flight: set[tuple[str, str]] = field(default_factory=set)  # (owner, idempotency key) being accepted now
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def over(cls, backend: Backend, settings: GatewaySettings) -> Gateway:
        """The gateway of a backend. Raises UserError where the keys file cannot be used."""
        metrics, keys, voices = Metrics(), Keys(settings), Voices(backend.store)
        webhooks = Webhooks(backend.store, backend.jobs, keys, settings, metrics)
        return cls(
            backend=backend,
            settings=settings,
            metrics=metrics,
            results=ResultsReader(backend.bus, metrics, webhooks),
            keys=keys,
            admission=Admission(backend, settings, metrics),
            voices=voices,
            recordings=Recordings(backend.store, voices, settings),
            webhooks=webhooks,
            listeners=Listeners(settings.listeners_max),
            speaking=asyncio.Semaphore(settings.speech_max),
        )

    async def watch(self) -> None:
        """Keep the backlog fresh and remove what has expired, until cancelled."""
        tidy_at = 0.0
        while True:
            try:
                await blocking(self.admission.look)
                if time.monotonic() >= tidy_at:
                    tidy_at = time.monotonic() + TIDY_EVERY_S
                    await blocking(self.tidy)
            except EditxError as error:
                log.warning("the backlog is not known: %s", error)
            except Exception:
                log.exception("the backlog is not known")
            await asyncio.sleep(self.settings.backlog_every_s)

    def tidy(self) -> None:
        """Remove uploads that nobody used, and batches whose jobs have expired."""
        self.backend.store.expire(UPLOADS, self.settings.upload_keep_s)
        self.backend.store.expire(BATCHES, self.settings.job_keep_s)
