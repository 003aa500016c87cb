"""The linguistic tokenizer's encoder: a SAN-M encoder that reads speech in overlapping chunks, and its k-means codes.

Published as the encoder of FunASR's ParaformerStreaming (SCAMA, arXiv 2006.01712), whose tensor names it keeps. The
official code walks over the chunks one by one and carries caches; here every chunk of every utterance is one row of a
batch, and the caches are gathers: a chunk sees `overlap` frames before its own and the keys of `look_back` chunks
before those. The numbers are the same. Knows nothing about audio, features or files.

Shapes: B utterances, T frames of 60 ms, C chunks, W = overlap + chunk positions in a window, D model size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LAYER_NORM_EPS = 1e-12  # as published, not torch's default


@dataclass(frozen=True)
class LinguisticConfig:
    """Sizes of the encoder; the defaults are those of the published model, the chunking is that of Step-Audio.

    chunk: frames that a step takes; overlap: frames before them that are computed again; look_back: earlier chunks
    whose keys and values are still seen.
    """

    input_size: int = 560
    output_size: int = 512
    attention_heads: int = 4
    linear_units: int = 2048
    num_blocks: int = 50
    kernel_size: int = 11
    dropout_rate: float = 0.1
    chunk: int = 4
    overlap: int = 5
    look_back: int = 4

    def __post_init__(self) -> None:
        sizes = (self.input_size, self.output_size, self.attention_heads, self.linear_units, self.kernel_size)
        if min(*sizes, self.num_blocks, self.chunk, self.overlap, self.look_back) < 1:
            raise ValueError(f"sizes, num_blocks, chunk, overlap and look_back must be positive: {self}")
        if self.output_size % self.attention_heads:
            raise ValueError(f"output_size {self.output_size} is no multiple of attention_heads {self.attention_heads}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {self.kernel_size} must be odd")

    @classmethod
    def from_published(cls, document: Mapping[str, Any]) -> LinguisticConfig:
        """The sizes in a FunASR `config.yaml`, read into a mapping; KeyError or ValueError where it is wrong."""
        encoder, frontend = document["encoder_conf"], document["frontend_conf"]
        if encoder.get("sanm_shfit", 0) != 0 or not encoder.get("normalize_before", True):
            raise ValueError("only encoders with sanm_shfit 0 and normalize_before true are published")
        if (int(frontend["lfr_m"]), int(frontend["lfr_n"])) != (7, 6):
            raise ValueError("only features of seven frames stacked every six are published")
        return cls(
            input_size=int(frontend["n_mels"]) * int(frontend["lfr_m"]),
            output_size=int(encoder["output_size"]),
            attention_heads=int(encoder["attention_heads"]),
            linear_units=int(encoder["linear_units"]),
            num_blocks=int(encoder["num_blocks"]),
            kernel_size=int(encoder["kernel_size"]),
            dropout_rate=float(encoder.get("dropout_rate", 0.1)),
        )


@dataclass(frozen=True)
class _Layout:
    """Which positions of the windows exist: the same for every layer.

    valid (B, C, W) marks frames inside the utterance (or the silence before it); keys (B * C, 1, 1, L + W) marks what
    a window may look at, with L = look_back * chunk positions of earlier chunks in front.
    """

    valid: Tensor
    keys: Tensor


class SanmAttention(nn.Module):
    """Self-attention with a depthwise convolution over the values (the FSMN memory) beside it."""

    def __init__(self, input_size: int, config: LinguisticConfig) -> None:
        super().__init__()
        size = config.output_size
        self.config = config
        self.linear_q_k_v = nn.Linear(input_size, 3 * size)
        self.linear_out = nn.Linear(size, size)
        self.fsmn_block = nn.Conv1d(size, size, config.kernel_size, groups=size, bias=False)

    def forward(self, x: Tensor, layout: _Layout) -> Tensor:
        """x (B, C, W, input) -> (B, C, W, D)."""
        size = self.config.output_size
        query, seen = self.linear_q_k_v(x).split([size, 2 * size], dim=-1)
        value = seen[..., size:]
        memory = self._memory(value, layout)
        keys, values = self._with_past(seen).chunk(2, dim=-1)
        context = functional.scaled_dot_product_attention(
            self._heads(query), self._heads(keys), self._heads(values), layout.keys
        )
        context = context.transpose(1, 2).reshape(value.shape)
        out: Tensor = self.linear_out(context)
        return out + memory

    def _heads(self, x: Tensor) -> Tensor:
        """(B, C, N, D) -> (B * C, heads, N, D / heads)."""
        rows = x.flatten(0, 1)
        return rows.view(*rows.shape[:2], self.config.attention_heads, -1).transpose(1, 2)

    def _with_past(self, x: Tensor) -> Tensor:
        """Puts before each window what earlier chunks computed at their first positions: (B, C, L + W, D).

        A window drops its last `overlap` positions from the cache: the next window computes them again.
        """
        chunks, look_back = x.shape[1], self.config.look_back
        kept = x[:, :, : self.config.chunk]
        earlier = functional.pad(kept, (0, 0, 0, 0, look_back, 0))  # (B, look_back + C, chunk, D)
        return torch.cat([*(earlier[:, start : start + chunks] for start in range(look_back)), x], dim=2)

    def _memory(self, value: Tensor, layout: _Layout) -> Tensor:
        value = value * layout.valid.unsqueeze(-1)
        rows = value.flatten(0, 1).transpose(1, 2)  # (B * C, D, W): the memory never leaves its window
        weight, half = self.fsmn_block.weight, self.config.kernel_size // 2
        memory = functional.conv1d(rows, weight, padding=half, groups=len(weight))
        return memory.transpose(1, 2).reshape(value.shape) + value


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between."""

    def __init__(self, config: LinguisticConfig) -> None:
        super().__init__()
        self.w_1 = nn.Linear(config.output_size, config.linear_units)
        self.w_2 = nn.Linear(config.linear_units, config.output_size)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        out: Tensor = self.w_2(self.dropout(functional.relu(self.w_1(x), inplace=True)))
        return out


class SanmBlock(nn.Module):
    """Pre-norm attention and feed-forward. The first block changes the size and so has no residual at its attention."""

    def __init__(self, input_size: int, config: LinguisticConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(input_size, eps=LAYER_NORM_EPS)
        self.self_attn = SanmAttention(input_size, config)
        self.norm2 = nn.LayerNorm(config.output_size, eps=LAYER_NORM_EPS)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.has_residual = input_size == config.output_size

    def forward(self, x: Tensor, layout: _Layout) -> Tensor:
        """(B, C, W, input) -> (B, C, W, D)."""
        attended = self.dropout(self.self_attn(self.norm1(x), layout))
        x = x + attended if self.has_residual else attended
        out: Tensor = x + self.dropout(self.feed_forward(self.norm2(x)))
        return out


class LinguisticEncoder(nn.Module):
    """Features at 60 ms to hidden states at 60 ms, chunk by chunk in meaning, all chunks at once in computation.

    Parameters are named as in the published `model.pt` below its prefix `encoder.`.
    """

    def __init__(self, config: LinguisticConfig) -> None:
        super().__init__()
        self.config = config
        self.encoders0 = nn.ModuleList([SanmBlock(config.input_size, config)])
        self.encoders = nn.ModuleList([SanmBlock(config.output_size, config) for _ in range(config.num_blocks - 1)])
        self.after_norm = nn.LayerNorm(config.output_size, eps=LAYER_NORM_EPS)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Features (B, T, input) with lengths (B,) in frames -> hidden states (B, T, D), zero past each length.

        Differentiable; every length gives the numbers that the utterance gives alone. Features stay float32 for weights
        of lower precision.
        """
        batch, frames, _ = features.shape
        if frames == 0:
            return features.new_zeros(batch, 0, self.config.output_size)
        if lengths is None:
            lengths = torch.full((batch,), frames, device=features.device)
        x = features * math.sqrt(self.config.output_size) + positions(frames, features.shape[-1]).to(features)
        windows, layout = self._windows(x.to(self.after_norm.weight.dtype), lengths)
        for block in (*self.encoders0, *self.encoders):
            windows = block(windows, layout)
        hidden = self.after_norm(windows[:, :, self.config.overlap :])  # a chunk answers for its own frames only
        hidden = hidden.flatten(1, 2)[:, :frames]
        inside = torch.arange(frames, device=features.device) < lengths[:, None]
        return torch.where(inside.unsqueeze(-1), hidden, 0.0)

    def _windows(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, _Layout]:
        """Embedded frames (B, T, F) to overlapping windows (B, C, W, F) and what exists in them.

        Before the utterance lie `overlap` frames of zeros (without a position) that count as frames, as published.
        """
        config, frames = self.config, x.shape[1]
        chunks = -(-frames // config.chunk)
        padded = functional.pad(x, (0, 0, config.overlap, chunks * config.chunk - frames))
        windows = padded.unfold(1, config.overlap + config.chunk, config.chunk).transpose(2, 3)

        index = torch.arange(chunks, device=x.device)
        offset = torch.arange(-config.overlap, config.chunk, device=x.device)
        valid = index[:, None] * config.chunk + offset < lengths[:, None, None]  # (B, C, W)
        earlier = torch.arange(config.look_back, device=x.device) - config.look_back
        past = (index[:, None] + earlier >= 0).repeat_interleave(config.chunk, dim=1)  # (C, L)
        keys = torch.cat([past.expand(len(lengths), -1, -1), valid | (offset < 0)], dim=2)
        return windows, _Layout(valid.to(x), keys.flatten(0, 1)[:, None, None])


def positions(frames: int, size: int) -> Tensor:
    """Sinusoidal positions 1..frames as (frames, size): sines in the first half, cosines in the second, float32."""
    step = math.log(10000) / (size / 2 - 1)
    scales = torch.exp(torch.arange(size // 2, dtype=torch.float32) * -step)
    angles = torch.arange(1, frames + 1, dtype=torch.float32)[:, None] * scales
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def nearest(hidden: Tensor, centroids: Tensor) -> Tensor:
    """Hidden states (..., D) to the index of the nearest of the centroids (K, D) by Euclidean distance, int64."""
    return torch.cdist(hidden.reshape(-1, hidden.shape[-1]), centroids).argmin(dim=1).view(hidden.shape[:-1])
