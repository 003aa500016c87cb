"""The semantic tokenizer's encoder: log mel to one of 4096 codes at 25 Hz.

`SemanticEncoder` has the structure of CosyVoice's S3 tokenizer (arXiv 2407.05407): Whisper's two convolutions, each
halving the rate, Whisper's transformer blocks with learned positions, and a codebook; sizes come from the config.
`WhisperSemanticEncoder` keeps the first layers of a trained Whisper as they are, at its own rate of 50 Hz, and has
blocks of its own above them. The published weights exist as ONNX only, so these modules are what a checkpoint of one's
own is trained with. Knows nothing about audio or ONNX.
"""

from __future__ import annotations

import math
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
        x = _through(self.blocks, x, inside)
        x = self.project(x)
        if self.config.bounded:
            x = torch.tanh(x)
        return functional.normalize(x, dim=-1) if self.config.distance == "cosine" else x

    def quantize(self, vectors: Tensor) -> Tensor:
        """Codes (B, N) int64 of vectors (B, N, codebook_dim) from `encode`."""
        if self.config.distance == "cosine":
            return _nearest_by_angle(vectors, self.codebook)
        # |v - c|^2 differs from -2 (v c - |c|^2 / 2) only by |v|^2
        return (vectors @ self.codebook.T - self.codebook.square().sum(-1) / 2).argmax(dim=-1)

    def forward(self, feats: Tensor, lengths: Tensor) -> Tensor:
        """Codes (B, ceil(T / 4)) int32; what lies past a row's own length means nothing."""
        return self.quantize(self.encode(feats, lengths)).to(torch.int32)


@dataclass(frozen=True)
class WhisperSemanticConfig:
    """Sizes; the defaults are those of the first four layers of Whisper-base and of a small checkpoint's own blocks.

    bins, size, heads and layers are Whisper's; width, own_heads and own_layers those above it.
    """

    bins: int = 80
    size: int = 512
    heads: int = 8
    layers: int = 4
    width: int = 256
    own_heads: int = 4
    own_layers: int = 3
    codebook_size: int = 4096
    codebook_dim: int = 32

    def __post_init__(self) -> None:
        if self.size % self.heads or self.width % self.own_heads:
            raise ValueError(f"{self.size} and {self.width} are no multiples of heads {self.heads}, {self.own_heads}")


class WhisperTrunk(nn.Module):
    """Whisper's convolutions and first transformer blocks (Radford et al., arXiv 2212.04356): log mel (B, bins, T) at
    100 Hz to states at 50 Hz."""

    def __init__(self, config: WhisperSemanticConfig) -> None:
        super().__init__()
        self.size = config.size
        self.conv1 = nn.Conv1d(config.bins, config.size, 3, padding=1)
        self.conv2 = nn.Conv1d(config.size, config.size, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList([SemanticBlock(config.size, config.heads) for _ in range(config.layers)])

    def forward(self, feats: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """What the convolutions give and what the last block gives, both (B, ceil(T / 2), size), zero past a row's
        length (B,) in mel frames."""
        inside = _inside(lengths, feats.shape[2], feats)
        x = functional.gelu(self.conv1(feats * inside)) * inside
        x = functional.gelu(self.conv2(x))
        inside = _inside(halved(lengths), x.shape[2], x)
        first = (x * inside).transpose(1, 2)
        x = _through(self.blocks, first + self._positions(inside), inside)
        return first, x * inside.transpose(1, 2)

    def _positions(self, inside: Tensor) -> Tensor:
        """Whisper's sinusoids (N, size) for a mask (B, 1, N): sines, then cosines, from one to 10,000 radians long."""
        steps = torch.cumsum(torch.ones_like(inside[0, 0]), 0) - 1
        channels = self.size // 2
        scales = torch.exp(-math.log(10_000) / (channels - 1) * torch.arange(channels, device=inside.device))
        angles = steps[:, None] * scales
        return torch.cat([angles.sin(), angles.cos()], 1)


class WhisperSemanticEncoder(nn.Module):
    """Log mel (B, bins, T) at 100 Hz to codes (B, ceil(T / 4)) at 25 Hz, from what Whisper's first layers hear.

    Own blocks read two frames of the trunk at a time: of its convolutions, which know pitch and detail, and of its last
    block, which knows sounds of speech whoever says them in whatever noise. Vectors have length one. The trunk has no
    gradients.
    """

    codebook: Tensor

    def __init__(self, config: WhisperSemanticConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = WhisperTrunk(config).requires_grad_(False)
        self.norm_detail, self.norm_sound = nn.LayerNorm(2 * config.size), nn.LayerNorm(2 * config.size)
        self.from_detail = nn.Linear(2 * config.size, config.width)
        self.from_sound = nn.Linear(2 * config.size, config.width)
        self.blocks = nn.ModuleList([SemanticBlock(config.width, config.own_heads) for _ in range(config.own_layers)])
        self.norm = nn.LayerNorm(config.width)
        self.project = nn.Linear(config.width, config.codebook_dim)
        self.register_buffer("codebook", torch.randn(config.codebook_size, config.codebook_dim))

    def encode(self, feats: Tensor, lengths: Tensor) -> Tensor:
        """Vectors (B, ceil(T / 4), codebook_dim) of log mel (B, bins, T) with lengths (B,) in mel frames. Every row
        gives the numbers that it gives alone."""
        with torch.no_grad():
            detail, sound = (_paired(states) for states in self.trunk(feats, lengths))
        x = self.from_detail(self.norm_detail(detail)) + self.from_sound(self.norm_sound(sound))
        inside = _inside(halved(halved(lengths)), x.shape[1], x)
        x = _through(self.blocks, x, inside)
        return functional.normalize(self.project(self.norm(x)), dim=-1)

    def quantize(self, vectors: Tensor) -> Tensor:
        """Codes (B, N) int64 of vectors (B, N, codebook_dim) from `encode`."""
        return _nearest_by_angle(vectors, self.codebook)

    def forward(self, feats: Tensor, lengths: Tensor) -> Tensor:
        """Codes (B, ceil(T / 4)) int32; what lies past a row's own length means nothing."""
        return self.quantize(self.encode(feats, lengths)).to(torch.int32)


def _through(blocks: nn.ModuleList, x: Tensor, inside: Tensor) -> Tensor:
    """x (B, N, C) through transformer blocks that see no further than each row's `inside` (B, 1, N)."""
    bias = ((1 - inside) * torch.finfo(torch.float16).min).unsqueeze(1)
    for block in blocks:
        x = block(x, bias)
    return x


def _nearest_by_angle(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Codes (B, N) int64 of vectors (B, N, D) of length one."""
    return (vectors @ functional.normalize(codebook, dim=-1).T).argmax(dim=-1)


def _paired(states: Tensor) -> Tensor:
    """Two frames as one, (B, N, C) -> (B, ceil(N / 2), 2 C)."""
    pairs = (states.shape[1] + 1) // 2
    padded = functional.pad(states, (0, 0, 0, 1))[:, : 2 * pairs]
    return padded.reshape(states.shape[0], pairs, 2 * states.shape[2])


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
