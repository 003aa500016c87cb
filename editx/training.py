"""The composition root of training: which models, rollouts and materials a recipe or a training job gets.

The trainer knows ports only; here they are filled with the services' models in this process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from services.llm.engine import Engine
from services.llm.requests import EngineSettings, Generation
from services.llm.sampling import SamplingSettings
from services.trainer.core.runs import Observer
from services.trainer.core.sampling import Vocabulary
from services.trainer.jobs import Place
from services.trainer.ppo.rollouts import Prompt, Rollout, Rollouts, State
from services.trainer.ppo.sources import Request, local_rollouts, local_scorer, pool_rollouts, pool_scorer
from services.trainer.settings import TrainerSettings
from shared.checkpoints.layout import Checkpoint
from shared.checkpoints.step1 import load_step1
from shared.inference.local import LocalInference, ModelFactory
from shared.inference.port import Inference, Model
from shared.models.step1 import Step1
from shared.store.port import ArtifactStore


def models(checkpoint: Checkpoint, device: str) -> Mapping[str, ModelFactory]:
    """The models that a checkpoint under test needs, loaded when they are first asked for."""

    def tokenizer() -> Model:
        from services.tokenizer.model import TokenizerModel

        return TokenizerModel(checkpoint, device=device)

    def llm() -> Model:
        from services.llm.model import LlmModel

        return LlmModel(checkpoint, device=device)

    def decoder() -> Model:
        from services.decoder.model import DecoderModel

        return DecoderModel(checkpoint, device=device)

    def reward() -> Model:
        from services.reward.model import RewardModel

        return RewardModel(checkpoint, device=device)

    return {"tokenizer": tokenizer, "llm": llm, "decoder": decoder, "reward": reward}


class Served:
    """Inference over one checkpoint at a time: asking for another closes the one before. Call `close` at the end."""

    def __init__(self) -> None:
        self._current: tuple[Path, str] | None = None
        self._inference: LocalInference | None = None

    def __call__(self, checkpoint: Path, device: str) -> Inference:
        if self._inference is None or self._current != (checkpoint, device):
            self.close()
            self._current = (checkpoint, device)
            self._inference = LocalInference(models(Checkpoint.resolve(checkpoint), device), concurrent=["llm"])
        return self._inference

    def close(self) -> None:
        if self._inference is not None:
            self._inference.close()
        self._inference = None


class EngineRollouts:
    """PPO's answers by the language model service's engine in this process: continuous batching, one engine a version.

    The repetition rule and new attempts are switched off, so that answers are draws of the policy.
    """

    def __init__(self, model: Step1, vocabulary: Vocabulary, settings: EngineSettings | None = None) -> None:
        self._model = model.eval()
        self._vocabulary, self._settings = vocabulary, settings or EngineSettings()
        self._version = 0
        self._engine: Engine | None = None

    def update(self, version: int, state: State) -> None:
        """Put new weights in; the engine is made anew, because it keeps rows of the output head."""
        self.close()
        self._model.load_state_dict(dict(state()))
        self._version = version

    def draw(self, prompts: Sequence[Prompt], temperature: float, seed: int) -> list[Rollout]:
        engine = self._running()
        submitted = []
        for place, prompt in enumerate(prompts):
            settings = SamplingSettings(
                temperature=temperature, repetition_window=0, attempts=1, min_groups=1, max_groups=prompt.max_groups,
                seed=(seed * 1_000_003 + place) % 2**62,
            )  # fmt: skip
            submitted.append(engine.submit(Generation(prompt.ids, settings)))
        outcomes = [generation.result() for generation in submitted]
        return [
            Rollout(prompt, outcome.mixed, len(outcome.mixed) < prompt.max_groups * 5, self._version)
            for prompt, outcome in zip(prompts, outcomes, strict=True)
        ]

    def close(self) -> None:
        """Stop the engine's thread."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def _running(self) -> Engine:
        if self._engine is None:
            with torch.inference_mode():
                self._engine = Engine(self._model, audio_offset=self._vocabulary.offset, eos=self._vocabulary.eos,
                                      settings=self._settings)  # fmt: skip
        return self._engine


def engine_rollouts(request: Request) -> Rollouts:
    """The engine over a copy of the SFT model, large enough for a step's answers side by side."""
    asked = request.config.prompts_per_step * request.config.samples_per_prompt
    settings = EngineSettings(slots=min(64, asked), queue_limit=100_000)
    return EngineRollouts(load_step1(request.base, device=request.device), request.vocabulary, settings)


def training_place(folder: Path, store: ArtifactStore, device: str, observer: Observer, served: Served) -> Place:
    """Where a training command works, with every source of rollouts and scores, and what decodes for a judge."""
    settings = TrainerSettings()
    return Place(
        folder, store, device, observer,
        {"local": local_rollouts, "engine": engine_rollouts, "pool": pool_rollouts(settings)},
        {"local": local_scorer, "pool": pool_scorer(settings)},
        lambda checkpoint, device: served(checkpoint.root, device),
    )  # fmt: skip
