"""Int8 weights, float activations: one scale per output channel, symmetric. Knows nothing about which model it shrinks.

The weights take half the memory of bf16, and decoding, which reads every weight once per step, speeds up with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED_ROWS = 128


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (out, in) as int8 (out, in) and scales (out,) in the weight's dtype: weight ~ int8 * scale."""
    exact = weight.float()
    scales = exact.abs().amax(dim=1).clamp(min=1e-12) / 127
    scales = scales.to(weight.dtype)
    quantized = (exact / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return quantized, scales


class Int8Linear(nn.Module):
    """A bias-free linear layer with an int8 weight (out, in) and scales (out,); x (..., in) -> (..., out).

    On a CPU, bf16 inputs of up to 128 rows go through torch's packed kernel, which reads the int8 weight directly and
    gives a row the same bits in a batch of any size. Longer inputs and other dtypes convert the weight first.
    """

    weight: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)

    @classmethod
    def of(cls, linear: nn.Linear) -> Int8Linear:
        """Quantise a linear layer without bias."""
        if linear.bias is not None:
            raise ValueError("Int8Linear has no bias")
        return cls(*quantize_weight(linear.weight.detach()))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.dtype == torch.bfloat16 and rows.device.type == "cpu" and rows.shape[0] <= PACKED_ROWS:
            out: Tensor = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.weight, self.scales)
        else:
            out = F.linear(rows, self.weight.to(x.dtype)) * self.scales.to(x.dtype)
        return out.reshape(*x.shape[:-1], self.weight.shape[0])


def quantize_int8(module: nn.Module) -> nn.Module:
    """Replace every nn.Linear inside a module by its Int8Linear, in place. Returns the module."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear.of(child))
        else:
            quantize_int8(child)
    return module


def output_rows(linear: nn.Module, ids: Tensor) -> nn.Module:
    """A copy of a linear layer that computes only some of its outputs: logits (..., len(ids)), in the order of ids."""
    if isinstance(linear, Int8Linear):
        return Int8Linear(linear.weight[ids].contiguous(), linear.scales[ids].contiguous())
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"output_rows takes a linear layer, got {type(linear).__name__}")
    chosen = nn.Linear(linear.in_features, len(ids), bias=False, device="meta")
    chosen.weight = nn.Parameter(linear.weight.detach()[ids].contiguous(), requires_grad=False)
    return chosen
