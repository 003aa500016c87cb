"""How fast post-training is: tokens/s and peak memory of SFT, reward and PPO steps, and rollouts per second.

Random weights at the sizes named, no checkpoint needed:

    python -m benchmarks.training                          # the small checkpoint's sizes on a CPU
    python -m benchmarks.training --device cuda --size nano --rows 64
    python -m benchmarks.training --device cuda --size official --checkpointing

Under the SFT and reward rows stand TRL's steps in the same run, where trl is installed (`pip install
editx[compare]`), or why TRL has none (`benchmarks.trl_steps`). `--steps sft` times some of the steps.

A PPO update counts the tokens of prompts and answers once, whatever the number of epochs. Rollouts are drawn at
temperature 1, `--slots` side by side.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks import trl_steps
from services.trainer.core.batches import Encoded, packed
from services.trainer.core.objectives import bradley_terry, gae, kl_estimate, policy_loss, shaped_rewards, value_loss
from services.trainer.core.sampling import Vocabulary, draw, log_probs, sequences
from services.trainer.core.settings import LoopConfig, make_optimizer
from services.trainer.reward.trainer import score_chats
from services.trainer.sft.trainer import sft_loss
from shared.codes import interleave
from shared.models.reward import Step1Reward
from shared.models.step1 import Step1, Step1Config

SIZES = {
    "nano": Step1Config(256, 640, 8, 2, 6, 9216),
    "official": Step1Config(3072, 8192, 48, 4, 32, 74752),
}
WARMUP = 1
STEPS = ("sft", "reward", "ppo", "rollouts")


@dataclass(frozen=True)
class Load:
    """What one step works on: rows of a prompt and an answer of so many tokens each."""

    rows: int
    prompt: int
    groups: int

    @property
    def tokens(self) -> int:
        return self.rows * (self.prompt + self.groups * 5 + 1)


def timed(work: Callable[[], object], repeats: int, device: torch.device) -> tuple[float, float]:
    """Median seconds of a call, and the peak memory in GB (of the device, or of the process on a CPU)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(WARMUP + repeats):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= WARMUP:
            seconds.append(time.perf_counter() - began)
    return float(np.median(seconds)), peak_gb(device)


def peak_gb(device: torch.device) -> float:
    """The most memory so far, of the device or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


class Bench:
    """The steps on random chats."""

    def __init__(self, size: str, load: Load, loop: LoopConfig) -> None:
        self.load, self.loop, self.device = load, loop, torch.device(loop.device)
        config = SIZES[size]
        self.vocabulary = Vocabulary(config.vocab_size - 5120, 3)
        rng = np.random.default_rng(0)
        self.prompts = [rng.integers(5, self.vocabulary.offset, load.prompt) for _ in range(load.rows)]
        self.answers = [
            interleave(rng.integers(0, 1024, load.groups * 2), rng.integers(0, 4096, load.groups * 3))
            for _ in range(2 * load.rows)
        ]
        self.model = self._model(config)

    def _model(self, config: Step1Config) -> Step1:
        model = Step1(config)
        model.initialise()
        model.gradient_checkpointing = self.loop.gradient_checkpointing
        model.attention = self.loop.attention
        return model.to(self.device)

    def _chats(self, answers: slice) -> list[Encoded]:
        ends = np.array([self.vocabulary.eos])
        return [
            Encoded(np.concatenate([p, a.astype(np.int64) + self.vocabulary.offset, ends]), len(p))
            for p, a in zip(self.prompts, self.answers[answers], strict=True)
        ]

    def sft(self) -> Callable[[], None]:
        optimizer = make_optimizer(self.model, self.loop)
        chats = self._chats(slice(self.load.rows))
        half = max(1, len(chats) // 2)
        batch = packed([chats[:half], chats[half:]] if len(chats) > 1 else [chats]).to(self.device)

        def step() -> None:
            with self.loop.autocast():
                loss = sft_loss(self.model, batch, batch.answer_tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    def reward(self) -> Callable[[], None]:
        model = Step1Reward(self.model)
        optimizer = make_optimizer(model, self.loop)
        chats = [*self._chats(slice(self.load.rows)), *self._chats(slice(self.load.rows, None))]

        def step() -> None:
            with self.loop.autocast():
                scores = score_chats(model, chats, "mean")
                loss = bradley_terry(*scores.split(self.load.rows))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    def ppo(self, epochs: int = 2) -> Callable[[], None]:
        critic = Step1Reward(self._model(self.model.config))
        optimizers = [make_optimizer(model, self.loop) for model in (self.model, critic)]
        limits = [self.load.groups + 1] * self.load.rows
        batch = sequences(self.prompts, self.answers[: self.load.rows], limits, self.vocabulary, self.device)
        scores = torch.randn_like(batch.mask)

        def step() -> None:
            with torch.no_grad(), self.loop.autocast():
                old, _ = log_probs(self.model, batch, self.vocabulary)
                old_values = critic(batch.ids).gather(1, batch.at) * batch.mask
            rewards = shaped_rewards(scores, batch.audio, kl_estimate(old, old), batch.mask, 0.05)
            advantages, returns = gae(rewards, old_values, batch.mask, 1.0, 0.95)
            for _ in range(epochs):
                with self.loop.autocast():
                    new, _ = log_probs(self.model, batch, self.vocabulary)
                    policy = policy_loss(new, old, advantages, batch.mask, 0.2)
                    values = critic(batch.ids).gather(1, batch.at)
                    loss = policy.loss + value_loss(values, old_values, returns, batch.mask, 0.2)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()

        return step

    def rollouts(self, slots: int) -> Callable[[], None]:
        def step() -> None:
            draw(self.model, self.prompts, [self.load.groups] * self.load.rows, self.vocabulary, slots=slots)

        return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="nano")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=4, help="chats, pairs or answers in a step")
    parser.add_argument("--prompt", type=int, default=400, help="tokens of a prompt")
    parser.add_argument("--groups", type=int, default=40, help="groups of five tokens in an answer")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["auto", "bf16", "float32"], default="auto")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    loop = LoopConfig(lr=1e-5, final_lr=1e-6, device=a.device, precision=a.precision,
                      gradient_checkpointing=a.checkpointing)  # fmt: skip
    load = Load(a.rows, a.prompt, a.groups)
    print(f"{a.size}, {a.device}, {load.rows} x ({load.prompt} + {load.groups * 5}) tokens, torch {torch.__version__}")
    print("| step | s | tokens/s | peak GB |\n|---|---|---|---|")
    shape = SIZES[a.size]
    for name, tokens in (("sft", load.tokens), ("reward", 2 * load.tokens), ("ppo", load.tokens)):
        if name not in a.steps:
            continue
        bench = Bench(a.size, load, loop)
        seconds, memory = timed(getattr(bench, name)(), a.repeats, bench.device)
        print(f"| {name} | {seconds:.3f} | {tokens / seconds:.0f} | {memory:.2f} |", flush=True)
        found = trl_steps.time_step(name, shape, load, loop, a.repeats)
        if isinstance(found, str):
            print(f"| TRL, {name} | {found} | | |", flush=True)
        else:
            print(f"| TRL, {name} | {found:.3f} | {tokens / found:.0f} | {peak_gb(bench.device):.2f} |", flush=True)
    if "rollouts" in a.steps:
        bench = Bench(a.size, load, loop)
        seconds, memory = timed(bench.rollouts(a.slots), a.repeats, bench.device)
        print(f"| rollouts | {seconds:.3f} | {load.rows * load.groups * 5 / seconds:.0f} (up to) | {memory:.2f} |")
        print(f"| TRL, rollouts | {trl_steps.NO_ROLLOUTS} | | |")
        print(f"{load.rows / seconds:.1f} rollouts/s of at most {load.groups * 5} tokens")


if __name__ == "__main__":
    main()
