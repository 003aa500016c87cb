"""What every training's config has in common, and how a model is made ready to be trained.

Nothing here depends on a stage. LoRA comes from peft, an optional package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from services.trainer.core.distributed import Group, Sharding
from shared.errors import MissingComponent, UserError
from shared.models.step1 import Step1

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoopConfig:
    """How a run goes, whatever it learns.

    `lr` falls to `final_lr` along half a cosine after `warmup_steps`. An optimizer step takes `accumulate` batches per
    process. `precision` "auto" is bf16 on devices that are fast at it. `lora_rank` 0 trains all weights. `attention`
    is Step1's: "dense" needs no compiler and suits short chats on small models, "flex" saves memory on large ones.
    """

    lr: float
    final_lr: float
    warmup_steps: int = 0
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    accumulate: int = 1
    seed: int = 0
    precision: Literal["auto", "bf16", "float32"] = "auto"
    gradient_checkpointing: bool = False
    attention: Literal["auto", "flex", "dense"] = "auto"
    lora_rank: int = 0
    lora_alpha: int = 32
    sharding: Sharding = "none"
    device: str = "cpu"
    save_every: int = 100
    log_every: int = 10
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        rules = {
            "lr must be positive and at least final_lr": 0 <= self.final_lr <= self.lr and self.lr > 0,
            "warmup_steps must not be negative": self.warmup_steps >= 0,
            "accumulate, save_every and log_every must be at least 1":
                min(self.accumulate, self.save_every, self.log_every) >= 1,
            "lora_rank must not be negative": self.lora_rank >= 0,
            "grad_clip must be positive": self.grad_clip > 0,
        }  # fmt: skip
        for rule, holds in rules.items():
            if not holds:
                raise UserError(f"Training config: {rule}.", code="invalid_training")

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of every forward pass: weights stay float32, products run in bfloat16 where asked."""
        kind = torch.device(self.device).type
        bf16 = self.precision == "bf16" or (self.precision == "auto" and kind == "cuda")
        return torch.autocast(kind, torch.bfloat16) if bf16 else nullcontext()


def prepare(model: nn.Module, config: LoopConfig, group: Group) -> nn.Module:
    """A model on its device with adapters, checkpointing and sharding as the config says; the same object."""
    trunk = next(module for module in model.modules() if isinstance(module, Step1))
    if config.lora_rank:
        add_lora(trunk, config.lora_rank, config.lora_alpha, config.seed)
    trunk.gradient_checkpointing = config.gradient_checkpointing
    trunk.attention = config.attention
    model.to(config.device)
    return group.shard(model).train()


def add_lora(model: Step1, rank: int, alpha: int, seed: int) -> None:
    """Freeze the trunk and put trainable low-rank matrices beside its projections. Raises MissingComponent.

    The matrices start from `seed` alone, so that all processes of a group have the same.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise MissingComponent(
            "The package peft", "LoRA needs it", "pip install peft (or editx[train]), or set lora_rank to 0."
        ) from error
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(LORA_TARGETS), lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model)


def trainable(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that learn."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def make_optimizer(model: nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    """AdamW, betas 0.9 and 0.95; matrices decay, norms do not."""
    parameters = list(trainable(model))
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(0.9, 0.95))


class Weights:
    """What a run saves of a model: the parameters that learn, whole also where they are sharded."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        return {n: whole(p.detach()).cpu() for n, p in self.model.named_parameters() if p.requires_grad}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        own = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if own.keys() != state.keys():
            raise UserError("The saved run trained other parameters than this config does.",
                            "Use a new run folder.", "run_conflict")  # fmt: skip
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(_like(parameter, state[name]))


class OptimizerState:
    """What a run saves of an optimizer, whole also where it is sharded."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        moments = {k: {n: whole(v).cpu() for n, v in slot.items()} for k, slot in state["state"].items()}
        return {"state": moments, "param_groups": state["param_groups"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            k: {n: _like(parameters[k], v) if v.ndim else v for n, v in slot.items()}
            for k, slot in state["state"].items()
        }
        self.optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; every process must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor laid out as the parameter is."""
    layout: Any = parameter
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(parameter.device), layout.device_mesh, layout.placements)
    return value.to(parameter.device)


@torch.no_grad()
def plain_state(model: Step1) -> dict[str, Tensor]:
    """The weights under the published names, LoRA merged in, shards joined, on the CPU."""
    merged: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        value = whole(parameter.detach())
        if ".base_layer." in name:
            owner: Any = modules[name.partition(".base_layer.")[0]]
            value = value + whole(owner.get_delta_weight("default")).to(value.dtype)
        merged[name.replace(".base_layer.", ".")] = value.cpu()
    return merged
