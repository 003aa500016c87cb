"""The gateway as an ASGI application: its parts, its routes and its background work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig

from services.gateway import openapi, problems
from services.gateway.backend import Backend
from services.gateway.gateway import Gateway
from services.gateway.observe import Observed
from services.gateway.routes import ROUTERS
from services.gateway.settings import GatewaySettings
from services.gateway.threads import blocking

OWN_SPANS = TelemetryConfig(tracing=False, metrics=False, logs=False, operation_spans=False)
"""Requests are observed here (observe.py); FastAPI's own spans would tell of each once more."""
DESCRIPTION = """Edit how a recording sounds and clone voices.

An edit is a job: send a recording, follow its events, fetch the audio. Errors are problem documents (RFC 9457).
"""


def create_app(backend: Backend, settings: GatewaySettings | None = None) -> FastAPI:
    """The application over a backend. Its lifespan starts the background work and closes the backend at the end."""
    settings = settings or GatewaySettings()
    gateway = Gateway.over(backend, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        gateway.webhooks.start()
        gateway.results.start()
        watching = asyncio.create_task(gateway.watch())
        try:
            yield
        finally:
            watching.cancel()
            await blocking(gateway.webhooks.stop)
            await blocking(gateway.results.stop)
            await blocking(backend.close)

    app = FastAPI(
        title="editx",
        version=_version(),
        description=DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        responses=problems.responses(422),
        telemetry=OWN_SPANS,
    )
    app.state.gateway = gateway
    app.add_middleware(
        Observed, metrics=gateway.metrics, max_body=settings.max_json_bytes, on_defect=problems.unforeseen
    )
    problems.install(app)
    openapi.install(app)
    for router in ROUTERS:
        app.include_router(router)
    return app


def _version() -> str:
    try:
        return version("editx")
    except PackageNotFoundError:
        return "0"
