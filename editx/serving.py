"""The gateway in this process: over the embedded system, or over the servers that the settings name.

The composition root of `editx serve`. Knows which adapters there are; the gateway does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from editx.embedded import Embedded
from services.gateway.backend import Backend, encoder, open_backend, reachable
from services.gateway.server import serve
from services.gateway.settings import GatewaySettings
from shared.checkpoints.layout import Checkpoint
from shared.schemas.route import StepKind

STEPS: tuple[StepKind, ...] = ("tokenize", "generate", "score", "decode")


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
    return Backend(
        system.bus,
        reachable(system.store, settings),
        system.jobs,
        system.inference,
        system.checkpoint.metadata,
        encoder(system.checkpoint),
        groups={kind: f"editx-{kind}" for kind in STEPS},
        has_reward=system.checkpoint.has_reward,
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
