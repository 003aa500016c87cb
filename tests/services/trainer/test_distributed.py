"""Two processes under torchrun train as one with two accumulated batches, and stop together: ddp and fsdp."""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from services.trainer.core.distributed import join_group, leave_group
from services.trainer.core.runs import Observer, RunStopped, Silent, read_log
from services.trainer.core.sampling import Vocabulary
from services.trainer.core.settings import LoopConfig
from services.trainer.ppo.config import Guards, PpoConfig
from services.trainer.ppo.guards import Runaway
from services.trainer.ppo.rollouts import LocalRollouts, Prompt, Rollout
from services.trainer.ppo.trainer import PpoTrainer, prompts_of
from services.trainer.sft.trainer import SftConfig, SftTrainer
from shared.checkpoints import Checkpoint
from shared.checkpoints.reward import load_reward
from shared.checkpoints.step1 import load_step1, load_text_tokenizer
from shared.checkpoints.verify import verify
from shared.errors import UserError
from shared.models.reward import Step1Reward
from tests.services.trainer.conftest import make_row
from tests.services.trainer.test_sft import StopAfter

CONFIG = SftConfig(row_tokens=1024, rows_per_batch=1, loop=LoopConfig(lr=1e-3, final_lr=1e-4, log_every=1))
ROOT = Path(__file__).parents[3]


def train(
    checkpoint: Path, folder: Path, sharding: str, accumulate: int, *, lora_rank: int = 0,
    observer: Observer | None = None,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    found = Checkpoint.resolve(checkpoint)
    config = replace(CONFIG, loop=replace(CONFIG.loop, sharding=sharding, accumulate=accumulate, lora_rank=lora_rank))
    trainer = SftTrainer(load_step1(found, dtype=torch.float32), load_text_tokenizer(found),
                         [make_row(i) for i in range(5)], config, folder, observer=observer)  # fmt: skip
    trainer.train()
    state = trainer.state()
    if trainer.group.is_main:
        torch.save(state, folder / "weights.pt")


class HighOnTheSecond:
    """Rewards that run away on one process only."""

    def score(self, rollouts: list[Rollout]) -> list[np.ndarray]:
        reward = 100.0 if os.environ["RANK"] == "1" else 0.0
        return [np.full(len(rollout.mixed), reward, np.float32) for rollout in rollouts]


def run_away(checkpoint: Path, folder: Path) -> None:
    """A PPO run that leaves a file per process that a guard stopped."""
    torch.set_num_threads(1)
    found = Checkpoint.resolve(checkpoint)
    tokenizer = load_text_tokenizer(found)
    vocabulary = Vocabulary(tokenizer.audio_offset, tokenizer.eos)
    config = PpoConfig(steps=2, critic_warmup=1, prompts_per_step=2, samples_per_prompt=1, max_stretch=0.5,
                       extra_groups=1, loop=replace(CONFIG.loop, sharding="ddp"))  # fmt: skip
    actor, critic, reference, drawer = (load_step1(found, dtype=torch.float32) for _ in range(4))
    prompts = prompts_of(tokenizer, [make_row(0), make_row(1)], config)
    trainer = PpoTrainer(actor, Step1Reward(critic), reference, prompts, LocalRollouts(drawer, vocabulary),
                         HighOnTheSecond(), vocabulary, config, folder)  # fmt: skip
    try:
        trainer.train()
    except Runaway:
        (folder / f"stopped-{trainer.group.rank}").touch()


class FewerOnTheSecond(LocalRollouts):
    """A source whose answers to the second process are partly of weights that are too old."""

    def draw(self, prompts: Sequence[Prompt], temperature: float, seed: int) -> list[Rollout]:
        drawn = super().draw(prompts, temperature, seed)
        stale = 3 if os.environ["RANK"] == "1" else 0
        return [replace(one, version=-9) if k < stale else one for k, one in enumerate(drawn)]


def uneven(checkpoint: Path, folder: Path, sharding: str) -> None:
    """Two PPO steps in which the processes have three prompts and two, and one of them drops answers."""
    torch.set_num_threads(1)
    found = Checkpoint.resolve(checkpoint)
    tokenizer = load_text_tokenizer(found)
    vocabulary = Vocabulary(tokenizer.audio_offset, tokenizer.eos)
    config = PpoConfig(steps=2, critic_warmup=0, prompts_per_step=5, samples_per_prompt=2, minibatch=2, micro=1,
                       max_stretch=0.5, extra_groups=1, loop=replace(CONFIG.loop, sharding=sharding),
                       guards=Guards(kl=50.0, shortest=0.0, longest=100.0, reward=1e3))  # fmt: skip
    actor, critic, reference, drawer = (load_step1(found, dtype=torch.float32) for _ in range(4))
    prompts = prompts_of(tokenizer, [make_row(i) for i in range(5)], config)
    trainer = PpoTrainer(actor, Step1Reward(critic), reference, prompts, FewerOnTheSecond(drawer, vocabulary),
                         HighOnTheSecond(), vocabulary, config, folder)  # fmt: skip
    trainer.train()
    state = trainer.state()
    torch.save(state, folder / f"weights-{trainer.group.rank}.pt")


def in_two_processes(checkpoint: Path, folder: Path, how: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "tests.services.trainer.test_distributed", str(checkpoint), str(folder), how]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("how", "lora_rank"), [("ddp", 0), ("fsdp", 0), ("fsdp-lora", 4)])
def test_two_processes_train_as_one_with_two_batches(how: str, lora_rank: int, tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path / "alone", "none", 2, lora_rank=lora_rank)
    in_two_processes(tiny, tmp_path / "both", how)
    alone, both = (torch.load(tmp_path / name / "weights.pt") for name in ("alone", "both"))
    for name, tensor in alone.items():
        torch.testing.assert_close(both[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_sharded_run_that_one_process_stopped_goes_on_exactly(tiny: Path, tmp_path: Path) -> None:
    in_two_processes(tiny, tmp_path / "whole", "fsdp-lora")
    in_two_processes(tiny, tmp_path / "parts", "fsdp-lora-stop")
    assert not (tmp_path / "parts" / "weights.pt").exists()
    assert torch.load(tmp_path / "parts" / "state.pt", weights_only=True)["step"] == 1
    in_two_processes(tiny, tmp_path / "parts", "fsdp-lora")
    whole, parts = (torch.load(tmp_path / name / "weights.pt") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(parts[name], tensor), name


def test_a_guard_stops_all_processes_when_one_runs_away(tiny: Path, tmp_path: Path) -> None:
    in_two_processes(tiny, tmp_path / "run", "run-away")
    assert {path.name for path in (tmp_path / "run").glob("stopped-*")} == {"stopped-0", "stopped-1"}
    assert (tmp_path / "run" / "state.pt").exists()


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_processes_with_unequal_numbers_of_answers_learn_together(sharding: str, tiny: Path, tmp_path: Path) -> None:
    in_two_processes(tiny, tmp_path / "run", f"uneven-{sharding}")
    first, second = (torch.load(tmp_path / "run" / f"weights-{rank}.pt") for rank in (0, 1))
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
    assert len(read_log(tmp_path / "run")) == 2


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


def test_each_process_sums_on_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    for name, value in {"WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: done.append(("device", device)))
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend: done.append(("group", backend)))
    group = join_group("ddp", "cuda:1")
    assert (group.rank, group.world) == (1, 2)
    assert done == [("device", "cuda:1"), ("group", "nccl")]


def test_shards_without_torchrun_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs torchrun"):
        train(tiny, tmp_path, "fsdp", 1)


if __name__ == "__main__":
    base, place, (kind, *more) = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split("-")
    if kind == "run":
        run_away(base, place)
    elif kind == "uneven":
        uneven(base, place, *more)
    else:
        stops = "stop" in more and os.environ["RANK"] == "1"
        with suppress(RunStopped):
            train(base, place, kind, 1, lora_rank=4 * ("lora" in more), observer=StopAfter(1) if stops else Silent())
    leave_group()
