"""The process of the gateway: an HTTP server over a backend, until it is told to end."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import uvicorn

from services.gateway.app import create_app
from services.gateway.backend import Backend, open_backend
from services.gateway.settings import GatewaySettings
from shared import telemetry

GRACE_S = 10


def serve(backend: Backend, settings: GatewaySettings) -> None:
    """Run the HTTP server; open event streams get a few seconds to end."""
    telemetry.configure_logs(settings.log_level, as_json=settings.log_json)
    end = telemetry.configure("gateway", spans_file=settings.spans_file, otlp_endpoint=settings.otlp_endpoint)
    try:
        config = uvicorn.Config(
            create_app(backend, settings),
            host=settings.host,
            port=settings.port,
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=GRACE_S,
            server_header=False,
        )
        with suppress(KeyboardInterrupt):  # uvicorn ends in order and then raises the signal that ended it
            asyncio.run(uvicorn.Server(config).serve())
    finally:
        end()


def main() -> None:
    """Serve over the servers that the EDITX_*_URL settings name."""
    settings = GatewaySettings()
    serve(open_backend(settings), settings)
