"""Workers whose models do nothing: `python -m editx.stack.null SERVICE`. They show what the rest of the system costs,
and are what the fault tests put under load.

The steps, artifacts and messages are the real ones; only the numbers inside are made up.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from services.decoder.handler import DecodeHandler
from services.llm.handler import GenerateHandler
from services.reward.handler import ScoreHandler
from services.tokenizer.handler import TokenizeHandler
from shared.inference.port import Inference, InferenceRequest, Model, Tensors
from shared.service import ServiceSettings, run_worker
from shared.steps import Handler

GROUPS = 4


class NullSettings(ServiceSettings):
    """How long a model that does nothing takes for it."""

    null_s: float = 0.0


class NullModel:
    """Answers every request with the same tensors, after `seconds`."""

    def __init__(self, name: str, answer: Tensors, seconds: float = 0.0) -> None:
        self.name = name
        self._answer = answer
        self._seconds = seconds

    def infer(self, requests: Sequence[InferenceRequest]) -> list[Tensors | Exception]:
        time.sleep(self._seconds)
        return [self._answer for _ in requests]


def answers() -> dict[str, Tensors]:
    """What the null model of each name answers."""
    linguistic, semantic = np.zeros(2 * GROUPS, np.int32), np.zeros(3 * GROUPS, np.int32)
    tokenized = {
        "linguistic": linguistic, "semantic": semantic,
        "speaker_embedding": np.zeros(192, np.float32), "prompt_mel": np.zeros((24, 80), np.float32),
    }  # fmt: skip
    mixed = np.tile(np.array([0, 0, 1024, 1024, 1024], np.int32), GROUPS)
    generated = {
        "mixed": mixed, "attempts": np.array(1, np.int32), "collapsed": np.array(False),
        "stretch": np.array(1, np.float32),
    }  # fmt: skip
    scores = {"scores": np.zeros(5 * GROUPS, np.float32), "score": np.array(0, np.float32)}
    return {
        "tokenizer": tokenized,
        "llm": generated,
        "reward": scores,
        "decoder": {"audio": np.sin(np.arange(2880, dtype=np.float32) / 9) / 2},
    }


def factories(seconds: float = 0.0) -> dict[str, Callable[[], Model]]:
    """Null models by name, for inference in this process."""
    return {name: partial(NullModel, name, answer, seconds) for name, answer in answers().items()}


def handlers(inference: Inference) -> Mapping[str, Handler]:
    """The handler of each service, with a text tokenizer that does nothing either."""
    return {
        "tokenizer": TokenizeHandler(inference),
        "llm": GenerateHandler(inference, lambda turns: [1]),
        "reward": ScoreHandler(inference, lambda turns: [1]),
        "decoder": DecodeHandler(inference),
    }


def main() -> None:
    """Work until SIGTERM."""
    service, seconds = sys.argv[1], NullSettings().null_s
    model = factories(seconds)[service]
    run_worker(service, lambda inference, _: handlers(inference)[service], {service: lambda _: model()},
               concurrent=[service])  # fmt: skip


if __name__ == "__main__":
    main()
