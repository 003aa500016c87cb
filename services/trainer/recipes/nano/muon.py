"""Muon (Jordan et al., 2024) with its products in the precision that the device is fast at.

`torch.optim.Muon` multiplies in bfloat16 everywhere; a CPU without instructions for it then spends nearly all of a
training step there. Update rule, defaults and state are torch's, so a run goes on with either.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from shared.checkpoints.weights import default_dtype

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration."""


def orthogonal(matrix: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """Nearly the matrix (m, n) with all its singular values at one, in `dtype`; a zero matrix stays zero."""
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """For the matrices of a model: momentum, made orthogonal, scaled to the size of AdamW's updates."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, *, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step with Nesterov's momentum and decoupled weight decay."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"]
                buffer.lerp_(parameter.grad, 1 - momentum)
                ahead = parameter.grad.lerp(buffer, momentum)
                update = orthogonal(ahead, default_dtype(parameter.device)).to(parameter)
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(update, alpha=-lr * 0.2 * max(parameter.shape) ** 0.5)
