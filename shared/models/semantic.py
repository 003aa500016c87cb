"""The semantic tokenizer's encoder: log mel to one of 4096 codes at 25 Hz.

The structure is that of CosyVoice's S3 tokenizer (arXiv 2407.05407): Whisper's two convolutions, each halving the rate,
Whisper's transformer blocks with learned positions, and a codebook; sizes come from the config. The published weights
exist as ONNX only, so this module is what a checkpoint of one's own is trained with. Knows nothing about audio or ONNX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class SemanticConfig:
    """Sizes; the defaults are the published ones.

    distance: how a vector finds its code. codebook_size vectors of codebook_dim; a dimension other than `size` puts a
    linear projection before the codebook. bounded: a tanh after it, which with `grid_codebook` is finite scalar
    quantisation (arXiv 2309.15505).
    """

    bins: int = 128
    size: int = 1280
    heads: int = 20
    layers: int = 6
    max_positions: int = 1500
    codebook_size: int = 4096
    codebook_dim: int = 1280
    distance: Literal["cosine", "euclid"] = "cosine"
    bounded: bool = False

    def __post_init__(self) -> None:
        if self.size % self.heads:
            raise ValueError(f"size {self.size} is no multiple of heads {self.heads}")


class SemanticAttention(nn.Module):
    """Whisper's self-attention: biases at query, value and output, none at the key."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size, bias=False)
        self.value = nn.Linear(size, size)
        self.out = nn.Linear(size, size)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, N, size), bias (B, 1, 1, N) added to the scores -> (B, N, size)."""
        batch, steps, size = x.shape
        shape = (batch, steps, self.heads, size // self.heads)
        query, key, value = (part(x).view(shape).transpose(1, 2) for part in (self.query, self.key, self.value))
        context = functional.scaled_dot_product_attention(query, key, value, bias)
        out: Tensor = self.out(context.transpose(1, 2).reshape(batch, steps, size))
        return out


class SemanticBlock(nn.Module):
    """Pre-norm attention and a four times wider GELU layer."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.attn_ln = nn.LayerNorm(size)
        self.attn = SemanticAttention(size, heads)
        self.mlp_ln = nn.LayerNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(B, N, size) -> (B, N, size)."""
        x = x + self.attn(self.attn_ln(x), bias)
        out: Tensor = x + self.mlp(self.mlp_ln(x))
        return out


class SemanticEncoder(nn.Module):
    """Log mel (B, bins, T) at 100 Hz to codes (B, ceil(T / 4)) at 25 Hz.

    `encode` gives the vectors before the codebook and is differentiable; `quantize` and `forward` give codes. The
    codebook is a buffer (codebook_size, codebook_dim) for the training to fill.
    """

    codebook: Tensor

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.bins, config.size, 3, stride=2, padding=1)
        self.conv2 = nn.Conv1d(config.size, config.size, 3, stride=2, padding=1)
        self.positions = nn.Parameter(torch.randn(config.max_positions, config.size) * 0.02)
        self.blocks = nn.ModuleList([SemanticBlock(config.size, config.heads) for _ in range(config.layers)])
        self.project: nn.Module = nn.Identity()
        if config.codebook_dim != config.size:
            self.project = nn.Linear(config.size, config.codebook_dim)
        self.register_buffer("codebook", torch.randn(config.codebook_size, config.codebook_dim))

    def encode(self, feats: Tensor, lengths: Tensor) -> Tensor:
        """Vectors (B, ceil(T / 4), codebook_dim) of log mel (B, bins, T) with lengths (B,) in mel frames.

        Cosine codebooks get vectors of length one. Every row gives the numbers that it gives alone.
        """
        x = functional.gelu(self.conv1(feats * _inside(lengths, feats.shape[2], feats)))
        lengths = halved(lengths)
        x = functional.gelu(self.conv2(x * _inside(lengths, x.shape[2], x)))
        inside = _inside(halved(lengths), x.shape[2], x)  # (B, 1, N)
        x = x.transpose(1, 2) + self.positions[: x.shape[2]]
        bias = ((1 - inside) * torch.finfo(torch.float16).min).unsqueeze(1)
        for block in self.blocks:
            x = block(x, bias)
        x = self.project(x)
        if self.config.bounded:
            x = torch.tanh(x)
        return functional.normalize(x, dim=-1) if self.config.distance == "cosine" else x

    def quantize(self, vectors: Tensor) -> Tensor:
        """Codes (B, N) int64 of vectors (B, N, codebook_dim) from `encode`."""
        if self.config.distance == "cosine":
            scores = vectors @ functional.normalize(self.codebook, dim=-1).T
        else:  # |v - c|^2 differs from -2 (v c - |c|^2 / 2) only by |v|^2
            scores = vectors @ self.codebook.T - self.codebook.square().sum(-1) / 2
        return scores.argmax(dim=-1)

    def forward(self, feats: Tensor, lengths: Tensor) -> Tensor:
        """Codes (B, ceil(T / 4)) int32; what lies past a row's own length means nothing."""
        return self.quantize(self.encode(feats, lengths)).to(torch.int32)


def halved(lengths: Tensor) -> Tensor:
    """Length after one of the two convolutions: half, rounded up."""
    return torch.div(lengths + 1, 2, rounding_mode="floor")


def grid_codebook(levels: tuple[int, ...]) -> Tensor:
    """All points of a grid in [-1, 1] with so many levels per dimension: a codebook (product, dimensions)."""
    axes = [torch.linspace(-1, 1, count) for count in levels]
    return torch.cartesian_prod(*axes).view(-1, len(levels))


def _inside(lengths: Tensor, steps: int, like: Tensor) -> Tensor:
    """Ones before each row's length and zeros after, (B, 1, steps)."""
    index = torch.arange(steps, device=like.device)
    return (index < lengths.unsqueeze(1)).to(like.dtype).unsqueeze(1)
