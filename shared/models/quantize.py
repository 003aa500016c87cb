"""Smaller weights, float activations: int8 with a symmetric scale per output channel, or float16 beside float32.

Decoding reads every weight once per step, so it speeds up as the weights shrink. Knows nothing about which model they
are of.
"""

from __future__ import annotations

from collections.abc import Callable

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
        return cls(*quantize_weight(_weight_alone(linear)))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.dtype == torch.bfloat16 and rows.device.type == "cpu" and rows.shape[0] <= PACKED_ROWS:
            out: Tensor = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.weight, self.scales)
        else:
            out = F.linear(rows, self.weight.to(x.dtype)) * self.scales.to(x.dtype)
        return out.reshape(*x.shape[:-1], self.weight.shape[0])


class HalfLinear(nn.Module):
    """A bias-free linear layer with a float16 weight (out, in) for CPUs that compute in float32; x (..., in) float32.

    FBGEMM widens the packed weight inside its product. Weights of bfloat16 above 6e-5 and below 65,504 stay exact.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.detach().float().contiguous(), None)

    @classmethod
    def of(cls, linear: nn.Linear) -> HalfLinear:
        """Pack a linear layer without bias."""
        return cls(_weight_alone(linear))

    @classmethod
    def joined(cls, *layers: nn.Module) -> HalfLinear:
        """One layer with the outputs of several, one after the other. Raises TypeError for layers of another kind."""
        packed = [layer for layer in layers if isinstance(layer, cls)]
        if len(packed) < len(layers):
            raise TypeError("only layers with float16 weights can be joined")
        return cls(torch.cat([layer.weight for layer in packed]))

    @staticmethod
    def works(dtype: torch.dtype, device: torch.device | str) -> bool:
        """Whether this machine has the kernel for products of such activations."""
        supported = "fbgemm" in torch.backends.quantized.supported_engines
        return supported and torch.device(device).type == "cpu" and dtype == torch.float32

    @property
    def weight(self) -> Tensor:
        """A float32 copy of the weight."""
        weight: Tensor = torch.ops.quantized.linear_unpack_fp16(self._packed)[0]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(rows, self._packed)
        return out.view(*x.shape[:-1], self.out_features)


def _weight_alone(linear: nn.Linear) -> Tensor:
    if linear.bias is not None:
        raise ValueError("only linear layers without bias can be made smaller")
    return linear.weight.detach()


def replace_linears(module: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Replace every nn.Linear inside a module by what `make` makes of it, in place. Returns the module."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, make(child))
        else:
            replace_linears(child, make)
    return module


def output_rows(linear: nn.Module, ids: Tensor) -> nn.Module:
    """A copy of a linear layer that computes only some of its outputs: logits (..., len(ids)), in the order of ids."""
    if isinstance(linear, Int8Linear):
        return Int8Linear(linear.weight[ids].contiguous(), linear.scales[ids].contiguous())
    if isinstance(linear, HalfLinear):
        return HalfLinear(linear.weight[ids])
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"output_rows takes a linear layer, got {type(linear).__name__}")
    chosen = nn.Linear(linear.in_features, len(ids), bias=False, device="meta")
    chosen.weight = nn.Parameter(linear.weight.detach()[ids].contiguous(), requires_grad=False)
    return chosen
