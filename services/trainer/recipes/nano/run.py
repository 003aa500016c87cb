"""The frame of every training here: a run folder, exact resume, a schedule, a log line every so many steps, a bound
in minutes.

Knows nothing about models. A run folder holds `state.pt` (parameters, optimizers, step, random states), written
whole or not at all, and `log.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from services.trainer.recipes.nano import assets
from services.trainer.recipes.nano.muon import Muon
from shared.checkpoints.weights import default_dtype

Recipe = TypeVar("Recipe")

TRAINED = ("linguistic", "speaker", "semantic", "flow", "heard", "vocoder", "llm", "recognizer", "words")
"""The trainings of the small checkpoint, in order."""


def training_options(description: str | None) -> argparse.ArgumentParser:
    """The options of every training: --minutes, --threads and --steps."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int)
    return parser


def pick_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def begin(arguments: argparse.Namespace, cpu: Recipe, gpu: Recipe) -> tuple[torch.device, Recipe]:
    """Where a training runs, on the threads of its options, and the recipe for it."""
    torch.set_num_threads(arguments.threads)
    device = pick_device()
    return device, gpu if device.type == "cuda" else cpu


def products(device: torch.device) -> torch.autocast:
    """The context of a forward pass: matrix products in bfloat16 where the device has instructions for them, else in
    float32, which a CPU without them does a hundred times faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=default_dtype(device) == torch.bfloat16)


def cosine(step: int, total: int, peak: float, final: float, warmup: int = 100) -> float:
    """Learning rate: linear warm-up, then half a cosine from peak to final."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * share))


class Run:
    """One resumable training.

    Args:
        name: the folder under `<data>/runs`.
        parts: whatever has a state_dict: modules, optimizers.
        steps: the planned number of steps; the schedule ends there.
        minutes: stop (and save) after so long, to be continued by the next call.
    """

    def __init__(
        self, name: str, parts: Mapping[str, Any], steps: int, minutes: float | None = None, save_every: int = 200
    ) -> None:
        self.folder = assets.data_dir() / "runs" / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.parts, self.steps, self.save_every = parts, steps, save_every
        self.step = 0
        self._until = time.monotonic() + minutes * 60 if minutes else math.inf
        self._sums: dict[str, float] = {}
        self._count = 0
        self._since = time.monotonic()
        state = self.folder / "state.pt"
        if state.exists():
            self._load(torch.load(state, map_location="cpu", weights_only=True))

    def _load(self, saved: dict[str, Any]) -> None:
        for name in self.parts.keys() & saved["parts"].keys():  # a run that was carried here has its weights alone
            self.parts[name].load_state_dict(saved["parts"][name])
        self.step = saved["step"]
        torch.set_rng_state(saved["rng"])
        print(f"{self.folder.name}: continuing at step {self.step} of {self.steps}", flush=True)

    @property
    def going(self) -> bool:
        return self.step < self.steps and time.monotonic() < self._until

    def rng(self) -> np.random.Generator:
        """The random numbers of this step: a function of the run's name and the step alone, so a resumed run
        draws the same."""
        return np.random.default_rng((sum(self.folder.name.encode()), self.step))

    def done_step(self, losses: Mapping[str, float | torch.Tensor], log_every: int = 50) -> None:
        """Count the step, log means, save when due."""
        for key, value in losses.items():
            self._sums[key] = self._sums.get(key, 0.0) + float(value)
        self._count += 1
        self.step += 1
        if self.step % log_every == 0:
            seconds = (time.monotonic() - self._since) / self._count
            line = {"step": self.step, "s_per_step": round(seconds, 3)}
            line |= {key: round(total / self._count, 4) for key, total in self._sums.items()}
            with (self.folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(f"{self.folder.name} {json.dumps(line)}", flush=True)
            self._sums, self._count, self._since = {}, 0, time.monotonic()
        if self.step % self.save_every == 0 or not self.going:
            self.save()

    def save(self) -> None:
        partial = self.folder / "state.partial"
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save({"parts": parts, "step": self.step, "rng": torch.get_rng_state()}, partial)
        partial.replace(self.folder / "state.pt")


def trained(name: str, part: str, module: nn.Module) -> nn.Module:
    """The module with the weights of a run's part, in eval mode. Raises SystemExit where the run is missing."""
    if Run(name, {part: module}, 0).step == 0:
        raise SystemExit(f"there is no run {name!r}, train it first: python -m services.trainer.recipes.nano.{name}")
    return module.eval()


def last_trained(*names: str) -> str:
    """The last of these runs that was trained, or the first of them."""
    return next((name for name in reversed(names) if Run(name, {}, 0).step), names[0])


class Optimizer:
    """Muon for the matrices inside a model, AdamW for everything else, behind one face.

    A small model on a CPU gets further per step with it. The two share a learning rate: Muon's updates are scaled to
    the size of AdamW's.

    Args:
        module: whose parameters to train.
        outside: parts of names whose matrices AdamW keeps: embeddings, heads.
    """

    def __init__(
        self, module: nn.Module, lr: float, *, outside: tuple[str, ...], betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.01,
    ) -> None:  # fmt: skip
        inside: list[nn.Parameter] = []
        other: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            is_inside = parameter.ndim == 2 and not any(part in name for part in outside)
            (inside if is_inside else other).append(parameter)
        self.parts = (
            Muon(inside, lr, weight_decay=weight_decay),
            torch.optim.AdamW(other, lr, betas=betas, weight_decay=weight_decay),
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()  # type: ignore[no-untyped-call]

    def state_dict(self) -> dict[str, Any]:
        return {str(number): part.state_dict() for number, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for number, part in enumerate(self.parts):
            part.load_state_dict(state[str(number)])


def set_lr(optimizer: torch.optim.Optimizer | Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def count_parameters(module: nn.Module) -> float:
    """Millions of parameters."""
    return sum(p.numel() for p in module.parameters()) / 1e6
