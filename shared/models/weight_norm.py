"""Weight norm folded into plain weights, from any of the names under which vocoders are published.

The vocoders here hold plain convolutions: faster to run, and a checkpoint reads the same however it was saved.
Knows nothing about files or about any one model.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

# (magnitude, direction): parametrizations of torch >= 2, and the hooks before.
SUFFIXES = ((".parametrizations.weight.original0", ".parametrizations.weight.original1"), (".weight_g", ".weight_v"))


def fold_weight_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace every (magnitude, direction) pair by `X.weight`; other tensors pass. (Weight norm: arXiv 1602.07868.)

    Raises KeyError naming the tensor when one half of a pair is missing.
    """
    folded: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for magnitude, direction in SUFFIXES:
            if name.endswith(magnitude):
                base = name.removesuffix(magnitude)
                folded[f"{base}.weight"] = _fold(tensor, state[base + direction])
                break
            if name.endswith(direction):
                if name.removesuffix(direction) + magnitude not in state:
                    raise KeyError(name.removesuffix(direction) + magnitude)
                break
        else:
            folded[name] = tensor
    return folded


def _fold(magnitude: Tensor, direction: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(direction.float().flatten(1), dim=1).view(magnitude.shape)
    folded: Tensor = direction.float() * (magnitude.float() / norm)
    return folded.to(direction.dtype)
