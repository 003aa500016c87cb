"""The process of the decoder service: wires the decode step to the worker runtime."""

from __future__ import annotations

from services.decoder.handler import MODEL, DecodeHandler
from shared.checkpoints.layout import Checkpoint
from shared.inference.port import Model
from shared.service import ServiceSettings, run_worker


def make_model(settings: ServiceSettings) -> Model:
    """The decoder's model, for inference in this process."""
    from services.decoder.model import DecoderModel

    return DecoderModel(Checkpoint.resolve(settings.checkpoint), device=settings.device)


def main() -> None:
    """Work until SIGTERM."""
    run_worker("decoder", lambda inference, _: DecodeHandler(inference), {MODEL: make_model})


if __name__ == "__main__":
    main()
