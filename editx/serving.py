"""The gateway in this process: over the embedded system, or over the servers that the settings name.

The composition root of `editx serve`. Knows which adapters there are; the gateway does not.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from editx.embedded import Embedded
from services.gateway.app import create_app
from services.gateway.backend import Backend, encoder, open_backend
from services.gateway.routes.artifacts import PREFIX
from services.gateway.settings import GatewaySettings
from shared import telemetry
from shared.checkpoints.layout import Checkpoint
from shared.schemas.route import StepKind
from shared.store.folder import FolderStore

STEPS: tuple[StepKind, ...] = ("tokenize", "generate", "score", "decode")
GRACE_S = 10


@dataclass(frozen=True)
class Choices:
    """What the command line decides. `folder` keeps jobs, voices and artifacts; None forgets them at the end."""

    checkpoint: str
    device: str
    folder: Path | None
    warm: bool


def embedded_backend(system: Embedded, settings: GatewaySettings) -> Backend:
    """A backend over an embedded system that runs; closing it ends the system.

    Presigned URLs lead to the gateway itself.
    """
    store = FolderStore(system.store.root, base_url=f"{settings.public_url.rstrip('/')}{PREFIX}")
    return Backend(
        system.bus,
        store,
        system.jobs,
        system.inference,
        system.checkpoint.metadata,
        encoder(system.checkpoint),
        groups={kind: f"editx-{kind}" for kind in STEPS},
        close=system.close,
    )


def serve_embedded(choices: Choices, settings: GatewaySettings) -> None:
    """Serve the whole system from this process, until interrupted."""
    system = Embedded(Checkpoint.resolve(choices.checkpoint), folder=choices.folder, device=choices.device).start()
    if choices.warm:
        for name in ("tokenizer", "llm", "decoder"):
            system.inference.load(name)
    serve(embedded_backend(system, settings), settings)


def serve_hosted(settings: GatewaySettings) -> None:
    """Serve the gateway alone, over the servers that the EDITX_*_URL settings name, until interrupted."""
    serve(open_backend(settings), settings)


def serve(backend: Backend, settings: GatewaySettings) -> None:
    """Run the HTTP server; open event streams get a few seconds to end."""
    telemetry.configure_logs(settings.log_level, as_json=settings.log_json)
    end = telemetry.configure("gateway", spans_file=settings.spans_file, otlp_endpoint=settings.otlp_endpoint)
    try:
        config = uvicorn.Config(
            create_app(backend, settings), host=settings.host, port=settings.port, access_log=False, log_config=None,
            timeout_graceful_shutdown=GRACE_S, server_header=False,
        )  # fmt: skip
        with suppress(KeyboardInterrupt):  # uvicorn ends in order and then raises the signal that ended it
            asyncio.run(uvicorn.Server(config).serve())
    finally:
        end()
