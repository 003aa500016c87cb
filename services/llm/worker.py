"""The process of the language model service: wires the generate step to the worker runtime."""

from __future__ import annotations

from services.llm.handler import MODEL, GenerateHandler
from shared.checkpoints.layout import Checkpoint
from shared.inference.port import Inference, Model
from shared.prompts import TextTokenizer
from shared.service import ServiceSettings, run_worker


def make_model(settings: ServiceSettings) -> Model:
    """The language model, for inference in this process."""
    from services.llm.model import LlmModel

    return LlmModel(Checkpoint.resolve(settings.checkpoint), device=settings.device)


def make_handler(inference: Inference, settings: ServiceSettings) -> GenerateHandler:
    """The handler needs the checkpoint's text tokenizer; the weights stay with the inference."""
    text = TextTokenizer.from_file(Checkpoint.resolve(settings.checkpoint).text_tokenizer_file)
    return GenerateHandler(inference, text.encode_chat)


def main() -> None:
    """Work until SIGTERM."""
    run_worker("llm", make_handler, {MODEL: make_model}, concurrent=[MODEL])


if __name__ == "__main__":
    main()
