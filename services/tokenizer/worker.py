"""The process of the tokenizer service: wires the tokenize step to the worker runtime."""

from __future__ import annotations

from services.tokenizer.handler import MODEL, TokenizeHandler
from shared.checkpoints.layout import Checkpoint
from shared.inference.port import Model
from shared.service import ServiceSettings, run_worker


def make_model(settings: ServiceSettings) -> Model:
    """The tokenizer's model, for inference in this process."""
    from services.tokenizer.model import TokenizerModel

    return TokenizerModel(Checkpoint.resolve(settings.checkpoint), device=settings.device)


def main() -> None:
    """Work until SIGTERM."""
    run_worker("tokenizer", lambda inference, _: TokenizeHandler(inference), {MODEL: make_model})


if __name__ == "__main__":
    main()
