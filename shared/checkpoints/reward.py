"""The reward model of a checkpoint: a language model in the published layout, flat, without its output head, and
reward_head.safetensors.

It lies in the folder `reward` of a checkpoint, or the checkpoint itself is one. Knows nothing about how it is trained.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from shared.checkpoints.layout import REWARD_FOLDER, REWARD_HEAD, Checkpoint, InvalidCheckpoint
from shared.checkpoints.step1 import load_step1
from shared.errors import MissingComponent
from shared.models.reward import Step1Reward

FOLDER, HEAD = REWARD_FOLDER, REWARD_HEAD


def reward_folder(checkpoint: Checkpoint) -> Path:
    """Where the checkpoint's reward model lies. Raises MissingComponent."""
    for folder in checkpoint.reward_dirs:
        if (folder / HEAD).is_file():
            return folder
    raise MissingComponent("The reward model", f"the checkpoint {checkpoint.root} has no {FOLDER}/{HEAD}",
                           "Train one with `editx train reward`, or ask for one candidate.")  # fmt: skip


def load_reward(
    checkpoint: Checkpoint, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[Step1Reward, str]:
    """The reward model in eval mode, and how its scores aggregate ("mean", "sum" or "last").

    Raises MissingComponent, InvalidCheckpoint.
    """
    folder = reward_folder(checkpoint)
    model = Step1Reward(load_step1(Checkpoint(folder), dtype=dtype, device=device, needs_head=False))
    try:
        with safe_open(folder / HEAD, framework="pt", device=str(device)) as file:
            facts = json.loads(file.metadata()["editx"])
            for name, tensor in (("weight", model.head.weight), ("bias", model.head.bias), ("mean", model.mean),
                                 ("std", model.std)):  # fmt: skip
                with torch.no_grad():
                    tensor.copy_(file.get_tensor(name))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InvalidCheckpoint(f"{folder / HEAD} is no reward head: {error}", "Train or fetch it again.") from error
    return model.eval(), str(facts["aggregate"])


def save_head(model: Step1Reward, folder: Path, *, aggregate: str) -> None:
    """Write reward_head.safetensors; the trunk's files are the caller's."""
    tensors = {"weight": model.head.weight, "bias": model.head.bias, "mean": model.mean, "std": model.std}
    plain = {name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / HEAD, metadata={"editx": json.dumps({"version": 1, "aggregate": aggregate})})
