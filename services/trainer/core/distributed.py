"""Several processes under torchrun: who is who, sharded weights, summed gradients. One process needs none of it.

"ddp" keeps whole weights on every device and sums gradients once a step; "fsdp" shards weights, gradients and optimizer
state (FSDP2). Losses are sums over tokens divided by the weight of the step over ALL processes, so gradients add up.
Knows nothing about what is trained.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shared.errors import UserError
from shared.models.step1 import Step1

Sharding = Literal["none", "ddp", "fsdp"]
LAST_TENSORS_S = 0.5
"""How long a process waits for the threads of its group to let go of their tensors."""


@dataclass(frozen=True)
class Group:
    """This process among the others."""

    rank: int = 0
    world: int = 1
    sharding: Sharding = "none"

    @property
    def is_main(self) -> bool:
        """The one that writes files and talks."""
        return self.rank == 0

    @property
    def gradient_scale(self) -> float:
        """FSDP averages gradients over the processes where sums are wanted: losses are multiplied by this."""
        return float(self.world) if self.sharding == "fsdp" else 1.0

    def shard(self, model: nn.Module) -> nn.Module:
        """Spread a model's weights over the processes (FSDP only), layer by layer; the same object comes back.

        Every part is its own unit, because trainings call the trunk and the head separately.
        """
        if self.sharding == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for module in _units(model):
                fully_shard(module)
        return model

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of all processes (ddp only)."""
        if self.sharding != "ddp" or self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        return self.totals([value])[0]

    def totals(self, values: Sequence[float]) -> list[float]:
        """The sums of numbers over all processes, place by place."""
        if self.world == 1:
            return list(values)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(tensor)
        found: list[float] = tensor.tolist()
        return found

    def most(self, count: int) -> int:
        """The largest of a number over all processes."""
        if self.world == 1:
            return count
        tensor = torch.tensor(count, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def mean(self, value: float, weight: float) -> float:
        """The mean of a number over all processes, weighted; the same on every one of them."""
        return value if self.world == 1 else self.total(value * weight) / self.total(weight)

    def anywhere(self, fact: bool) -> bool:
        """Whether something holds on at least one process; the same on every one of them."""
        return self.total(float(fact)) > 0

    def share(self, count: int) -> range:
        """This process's part of `count` things."""
        return range(self.rank, count, self.world)

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()


def _units(model: nn.Module) -> list[nn.Module]:
    trunk = next((module for module in model.modules() if isinstance(module, Step1)), None)
    units: list[nn.Module] = []
    if trunk is not None:
        parts = [*trunk.model.layers, trunk.model.embed_tokens, trunk.model.norm, trunk.lm_head]
        units = [part for part in parts if next(part.parameters(), None) is not None]
    covered = {id(p) for unit in units for p in unit.parameters()}
    rest = [m for m in model.modules() if any(id(p) not in covered for p in m.parameters(recurse=False))]
    return [*units, *rest]


def join_group(sharding: Sharding, device: str) -> Group:
    """The group that torchrun started this process in; alone without torchrun. Raises UserError if the two disagree."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 and sharding != "fsdp":
        return Group()
    if sharding == "none":
        raise UserError(f"torchrun started {world} processes and the config says sharding none.",
                        "Set sharding to ddp or fsdp, or start one process.", "invalid_training")  # fmt: skip
    if "RANK" not in os.environ:
        raise UserError("Sharding fsdp needs torchrun.", "torchrun --nproc-per-node N -m editx train ...",
                        "invalid_training")  # fmt: skip
    if not dist.is_initialized():
        if device.startswith("cuda"):
            torch.cuda.set_device(device)  # what is summed over processes lies on "cuda": each one's own, not the first
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Group(int(os.environ["RANK"]), world, sharding)


def leave_group() -> None:
    """All processes leave together, at the end of their work; nothing to do for one alone.

    Gloo's threads keep the tensors of the last calls until they get the interpreter for a moment. A process that ends
    before they had it is aborted, and torchrun reports a finished training as failed (pytorch/pytorch#190489).
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        time.sleep(LAST_TENSORS_S)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scale gradients to a norm of at most `limit`, over all processes where they are sharded; the norm before."""
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return float(whole)
