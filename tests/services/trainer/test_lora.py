"""LoRA by peft: only the adapters learn and are saved, a stopped run goes on exactly, the result has plain weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.trainer.core.batches import encode
from services.trainer.core.runs import RunStopped, Silent
from services.trainer.core.settings import LoopConfig
from services.trainer.data.manifest import collect
from services.trainer.jobs import Place, carry_out, parse_settings
from services.trainer.reward.trainer import RewardConfig, RewardTrainer, score_chats
from services.trainer.sft.trainer import SftConfig, SftTrainer
from shared.checkpoints import Checkpoint
from shared.checkpoints.reward import load_reward
from shared.checkpoints.step1 import load_step1
from shared.checkpoints.verify import verify
from shared.store.folder import FolderStore
from tests.services.trainer.conftest import make_row
from tests.services.trainer.test_sft import StopAfter

ROWS = [make_row(i) for i in range(6)]
CONFIG = SftConfig(
    epochs=2, row_tokens=1024, rows_per_batch=1,
    loop=LoopConfig(lr=1e-2, final_lr=1e-3, log_every=1, save_every=1, lora_rank=4),
)  # fmt: skip


def test_only_the_adapters_learn_and_the_result_is_merged(fresh, tokenizer, tmp_path: Path) -> None:
    base = fresh()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    trainer = SftTrainer(base, tokenizer, ROWS, CONFIG, tmp_path)
    learning = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert learning
    assert all(".lora_" in name for name in learning)
    trainer.train()
    state = trainer.state()
    assert state.keys() == before.keys()
    changed = {name for name in state if not torch.equal(state[name], before[name])}
    assert changed
    assert all("_proj." in name for name in changed)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["parts"]["model"].keys() == learning
    plain = fresh()
    plain.load_state_dict(state)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain.hidden_states(ids), trainer.model.hidden_states(ids), rtol=1e-4, atol=1e-4)


def test_a_resumed_lora_run_equals_one_that_was_never_stopped(fresh, tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)  # adapters start at random
    whole = SftTrainer(fresh(), tokenizer, ROWS, CONFIG, tmp_path / "whole")
    whole.train()
    torch.manual_seed(0)
    parts = SftTrainer(fresh(), tokenizer, ROWS, CONFIG, tmp_path / "parts", observer=StopAfter(1))
    with pytest.raises(RunStopped):
        parts.train()
    resumed = SftTrainer(fresh(), tokenizer, ROWS, replace(CONFIG), tmp_path / "parts")
    resumed.train()
    for name, tensor in whole.state().items():
        torch.testing.assert_close(resumed.state()[name], tensor, rtol=0, atol=0)


def test_a_job_with_lora_ends_in_a_published_checkpoint_with_merged_weights(tiny: Path, fresh, tmp_path: Path) -> None:
    dataset = collect("train", ROWS).save(tmp_path / "sets")
    loop = {"lr": 1e-2, "final_lr": 1e-3, "lora_rank": 4, "save_every": 1, "log_every": 1}
    settings = parse_settings({
        "base": str(tiny), "dataset": str(dataset), "config": {"row_tokens": 1024, "rows_per_batch": 1, "loop": loop},
    })  # fmt: skip
    carry_out("sft", settings, Place(tmp_path / "run", FolderStore(tmp_path / "store"), "cpu", Silent()))
    made = Checkpoint(tmp_path / "run" / "checkpoint")
    assert verify(made).ok
    before, after = fresh().state_dict(), load_step1(made, dtype=torch.float32).state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rsplit(".", 2)[1] for name in moved} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


def test_the_reward_models_head_learns_beside_the_adapters(fresh, tokenizer, checkpoint, tmp_path: Path) -> None:
    rows = [make_row(i, rejected=True) for i in range(4)]
    config = RewardConfig(pairs_per_batch=2, loop=replace(CONFIG.loop, lora_rank=2))
    trainer = RewardTrainer(fresh(), tokenizer, rows, config, tmp_path / "run")
    learning = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {name for name in learning if ".lora_" not in name} == {"head.weight", "head.bias"}
    trainer.train()
    assert bool(trainer.model.head.weight.abs().sum() > 0)
    trainer.save(checkpoint, tmp_path / "reward")
    expected = trainer.score(rows[0], [rows[0].target.mixed], tokenizer)
    model, _ = load_reward(Checkpoint.resolve(tmp_path / "reward"), dtype=torch.float32)
    chat = encode(tokenizer, rows[0].turns(), rows[0].target.mixed)
    with torch.no_grad():
        assert float(score_chats(model, [chat], "mean")[0]) == pytest.approx(expected[0], abs=0.05)
