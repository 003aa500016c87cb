"""Two processes under torchrun train as one with two accumulated batches: whole weights (ddp) and shards (fsdp)."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.trainer.core.distributed import leave_group
from services.trainer.core.settings import LoopConfig
from services.trainer.sft.trainer import SftConfig, SftTrainer
from shared.checkpoints import Checkpoint
from shared.checkpoints.reward import load_reward
from shared.checkpoints.step1 import load_step1, load_text_tokenizer
from shared.checkpoints.verify import verify
from shared.errors import UserError
from tests.services.trainer.conftest import make_row

CONFIG = SftConfig(row_tokens=1024, rows_per_batch=1, loop=LoopConfig(lr=1e-3, final_lr=1e-4, log_every=1))
ROOT = Path(__file__).parents[3]


def train(checkpoint: Path, folder: Path, sharding: str, accumulate: int) -> None:
    torch.set_num_threads(1)
    found = Checkpoint.resolve(checkpoint)
    config = replace(CONFIG, loop=replace(CONFIG.loop, sharding=sharding, accumulate=accumulate))
    trainer = SftTrainer(load_step1(found, dtype=torch.float32), load_text_tokenizer(found),
                         [make_row(i) for i in range(5)], config, folder)  # fmt: skip
    trainer.train()
    state = trainer.state()
    if trainer.group.is_main:
        torch.save(state, folder / "weights.pt")


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_train_as_one_with_two_batches(sharding: str, tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path / "alone", "none", 2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "tests.services.trainer.test_distributed", str(tiny), str(tmp_path / "both"), sharding]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    alone, both = (torch.load(tmp_path / name / "weights.pt") for name in ("alone", "both"))
    for name, tensor in alone.items():
        torch.testing.assert_close(both[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_sharded_reward_model_is_written_once_and_whole(tiny: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(make_row(i, rejected=True).model_dump_json() + "\n" for i in range(2)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "editx",
               "train", "reward", "--data", str(pairs), "--held-out", str(pairs), "--base", str(tiny), "--out",
               str(tmp_path / "run"), "--set", "loop.sharding=fsdp", "--set", "loop.lr=1e-3", "--set",
               "pairs_per_batch=1"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    made = Checkpoint(tmp_path / "run" / "checkpoint")
    assert verify(made).ok
    model, aggregate = load_reward(made)
    assert aggregate == "mean"
    assert model.head.weight.abs().max() > 0


def test_shards_without_torchrun_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs torchrun"):
        train(tiny, tmp_path, "fsdp", 1)


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], 1)
    leave_group()
