"""The served reward model on a random head: shapes, aggregates, limits, and batches that change nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from services.reward.model import RewardModel, aggregate
from services.reward.settings import RewardSettings
from shared.checkpoints import Checkpoint
from shared.checkpoints.reward import save_head
from shared.checkpoints.step1 import load_step1
from shared.codes import interleave
from shared.errors import UserError
from shared.inference.port import InferenceRequest
from shared.models.reward import Step1Reward


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    """The tiny language model as a reward model, by links beside a head that was drawn."""
    folder = tmp_path_factory.mktemp("reward")
    base = Checkpoint.resolve(tiny)
    for file in (base.step1_dir / "config.json", *base.step1_files, base.text_tokenizer_file):
        (folder / file.name).symlink_to(file)
    reward = Step1Reward(load_step1(base, dtype=torch.float32))
    torch.nn.init.normal_(reward.head.weight, generator=torch.Generator().manual_seed(0))
    save_head(reward, folder, aggregate="mean")
    settings = RewardSettings(dtype="float32", max_tokens=200)
    return RewardModel(Checkpoint.resolve(folder), settings=settings)


def request(length: int, groups: int) -> InferenceRequest:
    rng = np.random.default_rng(length)
    mixed = interleave(rng.integers(0, 1024, groups * 2), rng.integers(0, 4096, groups * 3))
    return InferenceRequest({"prompt": rng.integers(5, 300, length), "mixed": mixed})


def test_every_audio_token_has_a_score_and_their_mean_is_the_answers(model: RewardModel) -> None:
    answer = model.infer([request(20, 3)])[0]
    assert isinstance(answer, dict)
    assert answer["scores"].shape == (15,)
    assert answer["scores"].std() > 0
    assert answer["score"] == pytest.approx(answer["scores"].mean(), rel=1e-5)


def test_a_request_scores_alike_alone_and_in_a_batch(model: RewardModel) -> None:
    requests = [request(20, 3), request(35, 1), request(8, 6)]
    for one, together in zip(requests, model.infer(requests), strict=True):
        alone = model.infer([one])[0]
        assert isinstance(alone, dict)
        assert isinstance(together, dict)
        np.testing.assert_allclose(alone["scores"], together["scores"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("length", "groups", "message"), [(0, 1, "empty"), (10, 0, "empty"), (199, 1, "more than 200")]
)
def test_what_cannot_be_scored_is_refused_alone(model: RewardModel, length: int, groups: int, message: str) -> None:
    refused, scored = model.infer([request(length, groups), request(10, 1)])
    assert isinstance(refused, UserError)
    assert message in refused.message
    assert isinstance(scored, dict)


def test_scores_aggregate_as_the_model_was_trained() -> None:
    scores = np.array([1.0, 2.0, 6.0], np.float32)
    assert [aggregate(scores, how) for how in ("mean", "sum", "last")] == [3.0, 9.0, 6.0]
