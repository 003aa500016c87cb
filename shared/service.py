"""The entry point that every worker process shares: settings, logs, traces, adapters, one handler, and a clean end.

Knows nothing about a particular service: that one gives its handler and its models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared import telemetry
from shared.errors import TransientError
from shared.inference.port import Inference, Model
from shared.steps import Handler
from shared.surroundings import Surroundings
from shared.wiring import open_bus, open_inference, open_jobs, open_store
from shared.worker import Worker, WorkerSettings

log = logging.getLogger(__name__)


class ServiceSettings(BaseSettings):
    """Where a worker finds its surroundings; environment variables with the prefix EDITX_."""

    model_config = SettingsConfigDict(env_prefix="EDITX_", env_ignore_empty=True, extra="ignore")

    bus_url: str = "kafka://localhost:9092"
    store_url: str = "s3+http://localhost:9000/editx"
    jobs_url: str = "redis://localhost:6379/0"
    inference_url: str = "triton://localhost:8001"
    checkpoint: str = "nano"
    device: str = "cpu"
    slots: int = 1
    lease_s: float = 30.0
    drain_s: float = 30.0
    outage_s: float = Field(
        default=1800.0, gt=0.0, description="How long a worker waits for models and artifacts before failures count."
    )
    log_level: str = "INFO"
    log_json: bool = True
    otlp_endpoint: str | None = None
    spans_file: Path | None = None
    alive_file: Path | None = None


def run_worker(
    service: str,
    handler: Callable[[Inference, ServiceSettings], Handler],
    models: Mapping[str, Callable[[ServiceSettings], Model]],
    *,
    concurrent: Collection[str] = (),
) -> None:
    """Work until SIGTERM.

    `models` are what the steps need: they are made here where inference is local, with those in `concurrent` called by
    every thread, and waited for where a server has them.
    """
    settings = ServiceSettings()
    telemetry.configure_logs(settings.log_level, as_json=settings.log_json)
    end_telemetry = telemetry.configure(service, spans_file=settings.spans_file, otlp_endpoint=settings.otlp_endpoint)
    bus, store, jobs = open_bus(settings.bus_url), open_store(settings.store_url), open_jobs(settings.jobs_url)
    factories = {name: partial(make, settings) for name, make in models.items()}
    inference = open_inference(settings.inference_url, factories, concurrent=concurrent)

    def answer() -> bool:
        with suppress(TransientError):
            store.ping()
            return all(inference.ready(name) for name in models)
        return False

    worker = Worker(
        handler(inference, settings),
        bus,
        store,
        jobs,
        WorkerSettings(
            group=f"editx-{service}",
            slots=settings.slots,
            lease_s=settings.lease_s,
            drain_s=settings.drain_s,
            alive_file=settings.alive_file,
        ),
        Surroundings(answer, patience_s=settings.outage_s),
    )
    worker.stop_on_signals()
    try:
        worker.run()
    finally:
        inference.close()
        bus.close()
        jobs.close()
        end_telemetry()
