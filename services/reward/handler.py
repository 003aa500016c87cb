"""The score step: several candidates in, the best one out. Knows no bus, store or server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from shared.artifacts import Generated, Tokenized
from shared.inference.port import Inference, Tensors
from shared.prompts import Turn, edit_turns
from shared.schemas.edit import Edit
from shared.schemas.route import GENERATED, SCORES, StepKind, candidate
from shared.steps import StepContext

MODEL = "reward"

Encode = Callable[[Sequence[Turn]], Sequence[int]]


class ScoreHandler:
    """Has the reward model score every candidate and keeps the best.

    One that collapsed into a loop never wins alone.
    """

    kind: StepKind = "score"

    def __init__(self, inference: Inference, encode: Encode) -> None:
        self._inference = inference
        self._encode = encode

    def run(self, step: StepContext) -> None:
        """Writes the best candidate with its score, and the scores per token of all of them."""
        parameters = step.step.parameters
        source, edit = Tokenized.from_bytes(step.read("tokens")), Edit.model_validate(parameters["edit"])
        prompt = np.asarray(self._encode(edit_turns(edit, parameters["text"], source.mixed)), np.int64)
        count = sum(name.startswith("candidate-") for name in step.step.inputs)
        candidates = [Generated.from_bytes(step.read(candidate(number))) for number in range(count)]
        step.progress(0.05, "scoring candidates")
        with ThreadPoolExecutor(count) as pool:  # side by side, so that they share a batch
            answers = list(pool.map(lambda generated: self._score(step, prompt, generated), candidates))
        scored = [
            replace(generated, score=float(answer["score"].reshape(-1)[0]))
            for generated, answer in zip(candidates, answers, strict=True)
        ]
        best = max(scored, key=lambda generated: (not generated.collapsed, generated.score or 0.0))
        per_token = {str(number): answer["scores"].astype(np.float32) for number, answer in enumerate(answers)}
        step.write(SCORES, save(per_token))
        step.write(GENERATED, best.to_bytes())
        step.measure("score", best.score or 0.0)
        step.measure("candidates", count)

    def _score(self, step: StepContext, prompt: npt.NDArray[np.int64], generated: Generated) -> Tensors:
        return self._inference.infer(
            MODEL,
            {"prompt": prompt, "mixed": generated.mixed},
            deadline=step.deadline,
            cancelled=step.cancelled,
            priority=step.priority,
        )
