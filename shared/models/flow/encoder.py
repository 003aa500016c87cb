"""The conformer encoder of the flow: 25 Hz token embeddings to 50 Hz hidden states.

Linear + LayerNorm, a look-ahead convolution, conformer layers with relative positions (Transformer-XL), doubling in
time, and conformer layers again. Knows nothing about codebooks, mels or sampling. Parameter names are those of the
published checkpoint.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOOKAHEAD_HISTORY = 2  # frames that the causal half of the look-ahead layer remembers


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the encoder; the defaults are those of the published checkpoint."""

    input_size: int = 512
    output_size: int = 512
    pre_lookahead_len: int = 3
    num_blocks: int = 6
    num_up_blocks: int = 4
    up_stride: int = 2
    attention_heads: int = 8
    linear_units: int = 2048
    key_bias: bool = True
    dropout_rate: float = 0.1


class KeyValue(NamedTuple):
    """Keys and values of one attention layer, each (B, heads, frames, head size), oldest frame first."""

    keys: Tensor
    values: Tensor


class EncoderCache(NamedTuple):
    """What a stream carries from one chunk to the next."""

    lookahead: Tensor  # (B, C, 2)
    upsample: Tensor  # (B, C, 2 * up_stride)
    layers: list[KeyValue]  # first the layers before doubling, then those after


def relative_positions(keys: int, size: int, like: Tensor) -> Tensor:
    """Sinusoids of the distances keys-1 ... -(keys-1) between a query and a key, (2*keys-1, size), typed as `like`."""
    distance = torch.arange(keys - 1, -keys, -1, dtype=torch.float32, device=like.device)
    rate = torch.exp(torch.arange(0, size, 2, dtype=torch.float32, device=like.device) * (-math.log(10000.0) / size))
    angle = distance[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).to(like.dtype)


def relative_shift(scores: Tensor, keys: int) -> Tensor:
    """Scores by distance to scores by key, (B, H, T, 2*keys-1) -> (B, H, T, keys); the queries are the last T frames.

    Row i must move left by T-1-i. One leading zero per row, read back with rows one longer, moves all rows at once.
    """
    batch, heads, queries, width = scores.shape
    skewed = F.pad(scores, (1, 0)).reshape(batch, heads, width + 1, queries)
    return skewed[:, :, 1:].reshape(batch, heads, queries, width)[..., :keys]


class RelativeAttention(nn.Module):
    """Multi-head attention with relative positions and the two learned biases u and v (arXiv 1901.02860)."""

    def __init__(self, size: int, heads: int, key_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.linear_q = nn.Linear(size, size)
        self.linear_k = nn.Linear(size, size, bias=key_bias)
        self.linear_v = nn.Linear(size, size)
        self.linear_out = nn.Linear(size, size)
        self.linear_pos = nn.Linear(size, size, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, size // heads))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, size // heads))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).transpose(-2, -3)  # (..., T, C) -> (..., H, T, D)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """x (B, T, C), positions (2K-1, C), mask of keys (B, K) or None -> (B, T, C), all K keys and values."""
        query, key, value = self._split(self.linear_q(x)), self._split(self.linear_k(x)), self._split(self.linear_v(x))
        if past is not None:
            key, value = torch.cat([past.keys, key], dim=2), torch.cat([past.values, value], dim=2)
        by_distance = (query + self.pos_bias_v[:, None]) @ self._split(self.linear_pos(positions)).transpose(-1, -2)
        bias = relative_shift(by_distance, key.shape[2]) / math.sqrt(key.shape[3])
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None], -math.inf)
        out = F.scaled_dot_product_attention(query + self.pos_bias_u[:, None], key, value, attn_mask=bias)
        return self.linear_out(out.transpose(1, 2).flatten(2)), KeyValue(key, value)


class FeedForward(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, size: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.w_1 = nn.Linear(size, hidden)
        self.w_2 = nn.Linear(hidden, size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        out: Tensor = self.w_2(self.dropout(F.silu(self.w_1(x))))
        return out


class ConformerLayer(nn.Module):
    """A pre-norm conformer layer in its plain form: attention and feed-forward, no macaron half, no convolution."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size = config.output_size
        self.self_attn = RelativeAttention(size, config.attention_heads, config.key_bias)
        self.feed_forward = FeedForward(size, config.linear_units, config.dropout_rate)
        self.norm_mha = nn.LayerNorm(size, eps=1e-12)
        self.norm_ff = nn.LayerNorm(size, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """As RelativeAttention.forward."""
        attended, seen = self.self_attn(self.norm_mha(x), positions, mask, past)
        x = x + self.dropout(attended)
        return x + self.dropout(self.feed_forward(self.norm_ff(x))), seen


def run_layers(
    layers: nn.ModuleList, x: Tensor, mask: Tensor | None, past: Sequence[KeyValue | None]
) -> tuple[Tensor, list[KeyValue]]:
    """x (B, T, C) through conformer layers, each with what it has seen before; x and what each has seen now."""
    known = past[0].keys.shape[2] if past and past[0] is not None else 0
    positions = relative_positions(known + x.shape[1], x.shape[2], x)
    seen = []
    for layer, before in zip(layers, past, strict=True):
        x, now = layer(x, positions, mask, before)
        seen.append(now)
    return x, seen


class InputLayer(nn.Module):
    """Linear, LayerNorm, dropout, and the factor sqrt(C) that belongs to the positional encoding."""

    def __init__(self, input_size: int, size: int, dropout: float) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Linear(input_size, size), nn.LayerNorm(size, eps=1e-5), nn.Dropout(dropout))
        self.scale = math.sqrt(size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, input_size) -> (B, T, size)."""
        out: Tensor = self.out(x) * self.scale
        return out


class LookaheadLayer(nn.Module):
    """A residual pair of convolutions; the first sees the next frames, the second the last two outputs of the first."""

    def __init__(self, size: int, lookahead: int) -> None:
        super().__init__()
        self.lookahead = lookahead
        self.conv1 = nn.Conv1d(size, size, lookahead + 1)
        self.conv2 = nn.Conv1d(size, size, LOOKAHEAD_HISTORY + 1)

    def forward(self, x: Tensor, history: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T + lookahead, C), history (B, C, 2) or None -> (B, T, C) and the new history."""
        ahead = F.leaky_relu(self.conv1(x.transpose(1, 2)))
        ahead = F.pad(ahead, (LOOKAHEAD_HISTORY, 0)) if history is None else torch.cat([history, ahead], dim=2)
        out = self.conv2(ahead).transpose(1, 2)
        return out + x[:, : out.shape[1]], ahead[..., -LOOKAHEAD_HISTORY:]


class UpsampleLayer(nn.Module):
    """Repeats every frame `stride` times, then a causal convolution."""

    def __init__(self, size: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv1d(size, size, 2 * stride + 1)

    def forward(self, x: Tensor, history: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, C), history (B, C, 2*stride) or None -> (B, stride*T, C) and the new history."""
        repeated = x.transpose(1, 2).repeat_interleave(self.stride, dim=2)
        past = 2 * self.stride
        repeated = F.pad(repeated, (past, 0)) if history is None else torch.cat([history, repeated], dim=2)
        return self.conv(repeated).transpose(1, 2), repeated[..., -past:]


class Encoder(nn.Module):
    """Upsampling conformer encoder."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        size = config.output_size
        self.embed = InputLayer(config.input_size, size, config.dropout_rate)
        self.pre_lookahead_layer = LookaheadLayer(size, config.pre_lookahead_len)
        self.encoders = nn.ModuleList(ConformerLayer(config) for _ in range(config.num_blocks))
        self.up_layer = UpsampleLayer(size, config.up_stride)
        self.up_embed = InputLayer(size, size, config.dropout_rate)
        self.up_encoders = nn.ModuleList(ConformerLayer(config) for _ in range(config.num_up_blocks))
        self.after_norm = nn.LayerNorm(size, eps=1e-5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """A whole batch at once: x (B, T, C), mask of real frames (B, T) or None if all are -> (B, up_stride*T, C)."""
        x = self.embed(x)
        if mask is not None:
            x = x * mask[..., None]  # the look-ahead of the last real frame must see zeros, as it does alone
        x = F.pad(x, (0, 0, 0, self.config.pre_lookahead_len))
        return self._layers(x, mask, None)[0]

    def forward_chunk(self, x: Tensor, cache: EncoderCache | None, *, last: bool) -> tuple[Tensor, EncoderCache]:
        """One chunk of a stream: x (B, T + look-ahead, C), (B, T, C) if the last -> (B, up_stride*T, C), cache."""
        x = self.embed(x)
        if last:
            x = F.pad(x, (0, 0, 0, self.config.pre_lookahead_len))
        return self._layers(x, None, cache)

    def _layers(self, x: Tensor, mask: Tensor | None, cache: EncoderCache | None) -> tuple[Tensor, EncoderCache]:
        depth = len(self.encoders) + len(self.up_encoders)
        past: Sequence[KeyValue | None] = cache.layers if cache else [None] * depth
        x, lookahead = self.pre_lookahead_layer(x, cache.lookahead if cache else None)
        x, seen = run_layers(self.encoders, x, mask, past[: len(self.encoders)])
        x, upsample = self.up_layer(x, cache.upsample if cache else None)
        mask = None if mask is None else mask.repeat_interleave(self.config.up_stride, dim=1)
        x, seen_up = run_layers(self.up_encoders, self.up_embed(x), mask, past[len(self.encoders) :])
        return self.after_norm(x), EncoderCache(lookahead, upsample, seen + seen_up)
