"""Where PPO's answers and their scores come from: in this process, or from a pool of servers over the inference port.

Weights reach a source as numbered versions, and every answer says which version drew it. Knows nothing about updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.trainer.core.sampling import Ids, Vocabulary, draw, sequences
from shared.codes import Codes
from shared.inference.port import Inference
from shared.models.reward import Step1Reward
from shared.models.step1 import Step1

State = Callable[[], Mapping[str, Tensor]]
Scores = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt's ids and the most groups its answer may have."""

    ids: Ids
    max_groups: int


@dataclass(frozen=True, eq=False)
class Rollout:
    """An answer to a prompt: mixed ids, whether it ended by itself, and the version of the weights that drew it."""

    prompt: Prompt
    mixed: Codes
    ended: bool
    version: int


class Rollouts(Protocol):
    """A source of answers."""

    def update(self, version: int, state: State) -> None:
        """Take new weights; `state` gives them under the published names when they are wanted."""
        ...

    def draw(self, prompts: Sequence[Prompt], temperature: float, seed: int) -> list[Rollout]:
        """One answer per prompt, in order."""
        ...

    def close(self) -> None:
        """Let go of threads and connections. Safe to call twice."""
        ...


class Scorer(Protocol):
    """A source of rewards."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Scores]:
        """Scores per audio token of each answer, whose mean is the answer's reward."""
        ...


class LocalRollouts:
    """Draws in this process from a model of its own, `slots` answers side by side."""

    def __init__(self, model: Step1, vocabulary: Vocabulary, *, slots: int = 64) -> None:
        self._model, self._vocabulary, self._slots = model.eval(), vocabulary, slots
        self._version = 0

    def update(self, version: int, state: State) -> None:
        self._model.load_state_dict(dict(state()))
        self._version = version

    def draw(self, prompts: Sequence[Prompt], temperature: float, seed: int) -> list[Rollout]:
        answers = draw(
            self._model, [p.ids for p in prompts], [p.max_groups for p in prompts], self._vocabulary,
            temperature=temperature, seed=seed, slots=self._slots,
        )  # fmt: skip
        return [Rollout(p, a.mixed, a.ended, self._version) for p, a in zip(prompts, answers, strict=True)]

    def close(self) -> None:
        """Nothing is held."""


class PoolRollouts:
    """Draws from the model "llm" behind the inference port, `width` requests at a time.

    `deploy` brings a version to the pool and may return before every server has it; `deployed` tells the oldest version
    that still answers. The repetition rule and new attempts are switched off: they would not be the policy's draws.
    """

    def __init__(
        self, inference: Inference, deploy: Callable[[int, State], None], deployed: Callable[[], int], *,
        width: int = 32, close: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._inference, self._deploy, self._deployed, self._width = inference, deploy, deployed, width
        self._close = close

    def update(self, version: int, state: State) -> None:
        self._deploy(version, state)

    def draw(self, prompts: Sequence[Prompt], temperature: float, seed: int) -> list[Rollout]:
        def one(place: int) -> Rollout:
            prompt = prompts[place]
            version = self._deployed()
            parameters = {
                "temperature": temperature, "top_p": 1.0, "top_k": 0, "repetition_window": 0, "attempts": 1,
                "min_groups": 1, "max_groups": prompt.max_groups, "seed": (seed * 1_000_003 + place) % 2**62,
            }  # fmt: skip
            answer = self._inference.infer("llm", {"prompt": prompt.ids}, parameters=parameters)
            mixed = np.asarray(answer["mixed"], np.int32)
            return Rollout(prompt, mixed, len(mixed) < prompt.max_groups * 5, version)

        with ThreadPoolExecutor(self._width) as pool:
            return list(pool.map(one, range(len(prompts))))

    def close(self) -> None:
        self._close()


class LocalScorer:
    """Scores in this process."""

    def __init__(self, model: Step1Reward, vocabulary: Vocabulary, *, batch: int = 16) -> None:
        self._model, self._vocabulary, self._batch = model.eval(), vocabulary, batch

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> list[Scores]:
        scores: list[Scores] = []
        for start in range(0, len(rollouts), self._batch):
            part = rollouts[start : start + self._batch]
            limits = [r.prompt.max_groups for r in part]
            batch = sequences([r.prompt.ids for r in part], [r.mixed for r in part], limits, self._vocabulary,
                              self._model.trunk.device)  # fmt: skip
            rows = self._model(batch.ids).float().cpu().numpy()
            for row, rollout in zip(rows, part, strict=True):
                first = len(rollout.prompt.ids)
                scores.append(row[first : first + len(rollout.mixed)])
        return scores


class PoolScorer:
    """Scores by the reward service, over the inference port."""

    def __init__(self, inference: Inference, *, width: int = 16) -> None:
        self._inference, self._width = inference, width

    def score(self, rollouts: Sequence[Rollout]) -> list[Scores]:
        def one(rollout: Rollout) -> Scores:
            answer = self._inference.infer("reward", {"prompt": rollout.prompt.ids, "mixed": rollout.mixed})
            return np.asarray(answer["scores"], np.float32)

        with ThreadPoolExecutor(self._width) as pool:
            return list(pool.map(one, rollouts))
