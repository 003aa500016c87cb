"""The reward model on the tiny model: it learns an order, saves, loads and serves the same numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from services.reward.model import RewardModel
from services.trainer.core.settings import LoopConfig
from services.trainer.reward.trainer import Pair, RewardConfig, RewardTrainer, make_pairs, pair_report, score_chats
from shared.checkpoints import Checkpoint
from shared.checkpoints.reward import load_reward, reward_folder
from shared.errors import MissingComponent, UserError
from shared.inference.port import InferenceRequest
from tests.services.trainer.conftest import make_row

PAIRS = [make_row(i, rejected=True, margin=float(4 + i % 6), detail=("happy", "sad")[i % 2]) for i in range(48)]
CONFIG = RewardConfig(epochs=2, pairs_per_batch=8, loop=LoopConfig(lr=3e-3, final_lr=1e-3, log_every=1))


@pytest.fixture(scope="module")
def trained(checkpoint, tokenizer, tmp_path_factory):
    from shared.checkpoints.step1 import load_step1

    trunk = load_step1(checkpoint, dtype=torch.float32)
    trainer = RewardTrainer(trunk, tokenizer, PAIRS, CONFIG, tmp_path_factory.mktemp("reward"))
    trainer.train()
    return trainer


def test_held_out_pairs_come_out_in_the_right_order(trained, tokenizer) -> None:
    held_out = [make_row(i, rejected=True, margin=9.0) for i in range(100, 120)]
    report = trained.evaluate(held_out, tokenizer)
    assert report["accuracy"] >= 0.9
    assert report["pairs"] == 20
    assert report["groups"]["category emotion happy"]["pairs"] == 20
    assert report["groups"]["margin from 8"]["accuracy"] == report["accuracy"]
    assert 0 <= report["calibration_error"] < 0.5


def test_scores_have_a_common_scale(trained) -> None:
    model = trained.model
    chats = [c for p in trained.pairs for c in (p.chosen, p.rejected)]
    with torch.no_grad():
        scores = torch.cat([score_chats(model, chats[s : s + 16], "mean") for s in range(0, len(chats), 16)])
    assert abs(float(scores.mean())) < 1e-3
    assert float(scores.std()) == pytest.approx(1.0, abs=1e-3)


def test_a_new_head_scores_everything_alike(fresh, tokenizer) -> None:
    from shared.models.reward import Step1Reward

    pair = make_pairs(tokenizer, PAIRS[:1])[0]
    with torch.no_grad():
        assert score_chats(Step1Reward(fresh()), [pair.chosen, pair.rejected], "mean").tolist() == [0.0, 0.0]


def test_the_served_model_gives_the_trainers_scores_alone_and_in_a_batch(
    trained, checkpoint, tokenizer, tmp_path: Path
) -> None:
    trained.save(checkpoint, tmp_path / "reward")
    model = RewardModel(Checkpoint.resolve(tmp_path))
    requests = [
        InferenceRequest({"prompt": np.array(tokenizer.encode_chat(row.turns())), "mixed": side.mixed})
        for row in PAIRS[:2] for side in (row.target, row.rejected)
    ]  # fmt: skip
    together = model.infer(requests)
    loaded, how = load_reward(Checkpoint.resolve(tmp_path / "reward"), dtype=model.model.trunk.dtype)
    assert how == "mean"
    for request, answer in zip(requests, together, strict=True):
        assert answer["scores"].shape == request.inputs["mixed"].shape
        assert answer["scores"].dtype == np.float32
        assert answer["score"] == pytest.approx(answer["scores"].mean(), abs=1e-5)
        alone = model.infer([request])[0]
        np.testing.assert_allclose(alone["scores"], answer["scores"], atol=0.05)
    pairs = make_pairs(tokenizer, PAIRS[:2])
    with torch.no_grad():
        expected = score_chats(loaded, [pairs[0].chosen, pairs[0].rejected], "mean")
    np.testing.assert_allclose([together[0]["score"], together[1]["score"]], expected, atol=0.05)
    assert together[0]["score"] > together[1]["score"]


def test_a_bad_request_fails_alone(trained, checkpoint, tokenizer, tmp_path: Path) -> None:
    trained.save(checkpoint, tmp_path / "reward")
    model = RewardModel(Checkpoint.resolve(tmp_path))
    good = InferenceRequest({"prompt": np.array([1, 4]), "mixed": PAIRS[0].target.mixed})
    bad = InferenceRequest({"prompt": np.array([1, 10**6]), "mixed": PAIRS[0].target.mixed})
    answers = model.infer([bad, good])
    assert isinstance(answers[0], UserError)
    assert "outside" in answers[0].message
    assert isinstance(answers[1], dict)


def test_a_checkpoint_without_a_reward_model_says_so(checkpoint) -> None:
    with pytest.raises(MissingComponent, match="reward model"):
        reward_folder(checkpoint)


def test_a_row_without_a_rejected_answer_is_named(tokenizer) -> None:
    with pytest.raises(UserError, match="row-3 has no rejected answer"):
        make_pairs(tokenizer, [make_row(3)])


def test_the_report_counts_by_category_and_margin() -> None:
    none = np.zeros(0)
    pairs = [Pair(none, none, c, m) for c, m in (("a", 5.0), ("a", 7.0), ("b", 9.0), ("b", None))]
    report = pair_report(torch.tensor([1.0, -1.0, 2.0, 0.0]), pairs)
    assert report["accuracy"] == pytest.approx(2.5 / 4)
    assert report["groups"]["category a"] == {"pairs": 2, "accuracy": 0.5}
    assert report["groups"]["category b"] == {"pairs": 2, "accuracy": 0.75}
    assert report["groups"]["margin from 4"]["accuracy"] == 1.0
    assert report["groups"]["margin from 6"]["accuracy"] == 0.0
