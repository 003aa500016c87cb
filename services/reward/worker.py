"""The process of the reward service: wires the score step to the worker runtime."""

from __future__ import annotations

from services.reward.handler import MODEL, ScoreHandler
from shared.checkpoints.layout import Checkpoint
from shared.inference.port import Inference, Model
from shared.prompts import TextTokenizer
from shared.service import ServiceSettings, run_worker


def make_model(settings: ServiceSettings) -> Model:
    """The reward model, for inference in this process."""
    from services.reward.model import RewardModel

    return RewardModel(Checkpoint.resolve(settings.checkpoint), device=settings.device)


def make_handler(inference: Inference, settings: ServiceSettings) -> ScoreHandler:
    """The handler needs the checkpoint's text tokenizer; the weights stay with the inference."""
    text = TextTokenizer.from_file(Checkpoint.resolve(settings.checkpoint).text_tokenizer_file)
    return ScoreHandler(inference, text.encode_chat)


def main() -> None:
    """Work until SIGTERM."""
    run_worker("reward", make_handler, {MODEL: make_model})


if __name__ == "__main__":
    main()
