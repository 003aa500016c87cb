"""The score step."""

from __future__ import annotations

import numpy as np
import pytest

from services.reward.handler import ScoreHandler
from shared.artifacts import Generated
from shared.inference.port import Parameters, Tensors
from shared.schemas import Edit, JobRequest
from tests.services.fakes import FakeInference, FakeStep, tokenized


def score_by_length(inputs: Tensors, parameters: Parameters) -> Tensors:
    count = len(inputs["mixed"])
    return {"scores": np.ones(count, np.float32), "score": np.array(count, np.float32)}


@pytest.mark.parametrize(("collapsed", "winner"), [([False, False, False], 2), ([False, False, True], 1)])
def test_the_best_candidate_wins_unless_it_collapsed(collapsed: list[bool], winner: int) -> None:
    candidates = [
        Generated(tokenized(groups).mixed, seed=groups, attempts=1, seconds=1.0, collapsed=loops)
        for groups, loops in zip((2, 4, 6), collapsed, strict=True)
    ]
    inputs = {f"candidate-{number}.safetensors": one.to_bytes() for number, one in enumerate(candidates)}
    request = JobRequest(edit=Edit(type="style", detail="whisper"), text="Hello.", n_best=3)
    step = FakeStep(request, 2, {"tokens": tokenized().to_bytes(), **inputs})
    ScoreHandler(FakeInference(score_by_length), lambda turns: [1, 2]).run(step)
    best = Generated.from_bytes(step.written["generated.safetensors"])
    assert best.seed == candidates[winner].seed
    assert best.score == len(best.mixed) == step.metrics["score"]
    assert "scores.safetensors" in step.written
