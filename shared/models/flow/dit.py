"""The velocity estimator of the flow: a diffusion transformer with a causal convolution in every block.

Frames attend to all frames without any positional encoding; order enters through the convolutions alone. Knows nothing
about time schedules, guidance or noise. Parameter names are those of the published checkpoint. (DiT: arXiv 2212.09748.)
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIMESTEP_SIZE = 256
TIMESTEP_SCALE = 1000.0  # the flow's time 0..1 in the units of the sinusoids
MAX_PERIOD = 10000.0
CPU_QUERIES = 512  # rows of attention at a time: more do not fit a cache


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the estimator; the defaults are those of the published checkpoint."""

    in_channels: int = 320
    out_channels: int = 80
    mlp_ratio: float = 4.0
    depth: int = 16
    num_heads: int = 8
    head_dim: int = 64
    hidden_size: int = 512


class BlockCache(NamedTuple):
    """What one block carries from one chunk of a stream to the next."""

    keys: Tensor  # (B, heads, frames, head_dim), oldest first
    values: Tensor
    conv1: Tensor  # (B, C, 2), the last inputs of each convolution
    conv2: Tensor


class TimestepEmbedder(nn.Module):
    """Sinusoids of the time in float32, then a two-layer network."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIMESTEP_SIZE, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, time: Tensor, dtype: torch.dtype) -> Tensor:
        """Times (B,) in 0..1 -> (B, size)."""
        half = TIMESTEP_SIZE // 2
        rate = torch.exp(torch.arange(half, dtype=torch.float32, device=time.device) * (-math.log(MAX_PERIOD) / half))
        angle = time.float()[:, None] * TIMESTEP_SCALE * rate
        out: Tensor = self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype))
        return out


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention over (B, H, T, D) with a mask of keys (B, 1, 1, K).

    In bfloat16 on a CPU the fused kernel converts to float32 and back; plain products are twice as fast.
    """
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or torch.is_grad_enabled():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    query, key = query * query.shape[-1] ** -0.5, key.transpose(-1, -2)
    rows = []
    for part in torch.split(query, CPU_QUERIES, dim=2):
        scores = part @ key
        if mask is not None:
            scores = scores.masked_fill_(~mask, -math.inf)
        rows.append(scores.softmax(-1) @ value)
    return torch.cat(rows, dim=2)


class Attention(nn.Module):
    """Full self-attention with a LayerNorm per head on queries and keys."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        inner = config.num_heads * config.head_dim
        self.to_q = nn.Linear(config.hidden_size, inner)
        self.to_k = nn.Linear(config.hidden_size, inner)
        self.to_v = nn.Linear(config.hidden_size, inner)
        self.q_norm = nn.LayerNorm(config.head_dim)
        self.k_norm = nn.LayerNorm(config.head_dim)
        self.proj = nn.Linear(inner, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None, past: BlockCache | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C), mask of keys (B, 1, 1, K) -> (B, T, C), keys and values (B, H, K, D)."""
        split = (*x.shape[:2], self.heads, -1)
        query, key = self.q_norm(self.to_q(x).view(split)), self.k_norm(self.to_k(x).view(split))
        query, key, value = (part.transpose(1, 2) for part in (query, key, self.to_v(x).view(split)))
        if past is not None:
            key, value = torch.cat([past.keys, key], dim=2), torch.cat([past.values, value], dim=2)
        out = attention(query, key, value, mask)
        return self.proj(out.transpose(1, 2).flatten(2)), key, value


class CausalConv(nn.Conv1d):
    """A convolution over (B, T, C) that sees the past only; beyond the start it sees zeros or the history."""

    def forward(self, x: Tensor, history: Tensor | None = None) -> Tensor:
        """x (B, T, C), history (B, k-1, C) -> (B, T, C)."""
        x = F.pad(x, (0, 0, self.kernel_size[0] - 1, 0)) if history is None else torch.cat([history, x], dim=1)
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ConvBlock(nn.Module):
    """Two causal convolutions of three frames with LayerNorm and Mish between them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        # The published names count the axis swaps around each convolution as modules.
        self.block = nn.ModuleDict(
            {"1": CausalConv(size, size, 3), "3": nn.LayerNorm(size), "6": CausalConv(size, size, 3)}
        )

    def forward(self, x: Tensor, past: BlockCache | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> (B, T, C) and the last two inputs of each convolution, (B, 2, C)."""
        middle = F.mish(self.block["3"](self.block["1"](x, past.conv1 if past else None)))
        out = self.block["6"](middle, past.conv2 if past else None)
        return out, _last_two(x, past.conv1 if past else None), _last_two(middle, past.conv2 if past else None)


def _last_two(x: Tensor, history: Tensor | None) -> Tensor:
    """The last two frames of history and x, (B, 2, C), zeros before the start."""
    if x.shape[1] >= 2:
        return x[:, -2:]
    return F.pad(x, (0, 0, 1, 0)) if history is None else torch.cat([history[:, -1:], x], dim=1)


class MLP(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, hidden)
        self.fc2 = nn.Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters of its own, scaled and shifted by the timestep."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class Modulation(nn.ModuleDict):
    """SiLU and a linear layer from the timestep to `parts` vectors; zero at first: a block begins as identity."""

    def __init__(self, size: int, parts: int) -> None:
        super().__init__({"1": nn.Linear(size, parts * size)})
        self.parts = parts

    def forward(self, time: Tensor) -> tuple[Tensor, ...]:
        """(B, C) -> `parts` tensors (B, 1, C)."""
        return self["1"](F.silu(time))[:, None].chunk(self.parts, dim=-1)  # type: ignore[no-any-return]


class DiTBlock(nn.Module):
    """adaLN-Zero block. Modulations are stored as attention, MLP, convolution; it runs attention, convolution, MLP."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config.hidden_size, int(config.hidden_size * config.mlp_ratio))
        self.conv = ConvBlock(config.hidden_size)
        self.adaLN_modulation = Modulation(config.hidden_size, 9)

    def forward(
        self, x: Tensor, time: Tensor, mask: Tensor | None, past: BlockCache | None
    ) -> tuple[Tensor, BlockCache]:
        """x (B, T, C), time (B, C) or (1, C) -> (B, T, C) and the cache after this chunk."""
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate, conv_shift, conv_scale, conv_gate = (
            self.adaLN_modulation(time)
        )
        attended, keys, values = self.attn(modulated_norm(x, attn_shift, attn_scale), mask, past)
        x = torch.addcmul(x, attn_gate, attended)
        convolved, conv1, conv2 = self.conv(modulated_norm(x, conv_shift, conv_scale), past)
        x = torch.addcmul(x, conv_gate, convolved)
        x = torch.addcmul(x, mlp_gate, self.mlp(modulated_norm(x, mlp_shift, mlp_scale)))
        return x, BlockCache(keys, values, conv1, conv2)


class FinalLayer(nn.Module):
    """Modulated norm and the projection to the mel."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.adaLN_modulation = Modulation(config.hidden_size, 2)
        self.linear = nn.Linear(config.hidden_size, config.out_channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, out_channels)."""
        out: Tensor = self.linear(modulated_norm(x, *self.adaLN_modulation(time)))
        return out


class DiT(nn.Module):
    """Velocity of the flow at a point in time, given the conditions."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.in_proj = nn.Linear(config.in_channels, config.hidden_size)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.apply(_initialize)

    def forward(
        self, x: Tensor, time: Tensor, mu: Tensor, speaker: Tensor, cond: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Velocity (B, T, 80) in float32.

        x, mu, cond (B, T, 80); speaker (B, 80); time (B,) or (1,) in 0..1; mask of real frames (B, T), None if all are.
        """
        hidden, embedded = self._enter(x, time, mu, speaker, cond)
        keys = None if mask is None else mask[:, None, None]
        for block in self.blocks:
            hidden, _ = block(hidden, embedded, keys, None)
        return self.final_layer(hidden, embedded).float()  # type: ignore[no-any-return]

    def forward_chunk(
        self, x: Tensor, time: Tensor, mu: Tensor, speaker: Tensor, cond: Tensor, past: list[BlockCache] | None
    ) -> tuple[Tensor, list[BlockCache]]:
        """As `forward` for one chunk of a stream; `past` and the second result hold one cache per block."""
        hidden, embedded = self._enter(x, time, mu, speaker, cond)
        caches = []
        for index, block in enumerate(self.blocks):
            hidden, cache = block(hidden, embedded, None, past[index] if past else None)
            caches.append(cache)
        return self.final_layer(hidden, embedded).float(), caches

    def _enter(self, x: Tensor, time: Tensor, mu: Tensor, speaker: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        dtype = self.in_proj.weight.dtype
        speaker = speaker[:, None].expand(-1, x.shape[1], -1)
        hidden = self.in_proj(torch.cat([part.to(dtype) for part in (x, mu, speaker, cond)], dim=-1))
        return hidden, self.t_embedder(time, dtype)


def _initialize(module: nn.Module) -> None:
    """Start of training: plain layers by Xavier, the timestep network small, modulations and output zero."""
    if isinstance(module, TimestepEmbedder):
        nn.init.normal_(module.get_parameter("mlp.0.weight"), std=0.02)
        nn.init.normal_(module.get_parameter("mlp.2.weight"), std=0.02)
    elif isinstance(module, Modulation):
        nn.init.zeros_(module.get_parameter("1.weight"))
    elif isinstance(module, FinalLayer):
        nn.init.zeros_(module.linear.weight)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
