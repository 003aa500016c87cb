"""Step1: the autoregressive language model of Step-Audio-EditX (arXiv 2511.03601), for inference and training.

Parameter names are those of the published tensors. Grouped-query attention with square-root ALiBi and no rotary
embedding, RMSNorm, SwiGLU, untied output head, no bias anywhere. It knows nothing about prompts, sampling or files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared.models.quantize import HalfLinear
from shared.models.step1_attention import (
    Attend,
    CachedDecode,
    CachedPrefill,
    FlexSequences,
    KVCache,
    SqrtAlibi,
    StaticDecode,
    WholeSequences,
)

CPU_CHUNK = 256
CUDA_CHUNK = 512
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_attention_groups", "num_hidden_layers",
         "vocab_size", "max_seq_len")  # fmt: skip


@dataclass(frozen=True)
class Step1Config:
    """Sizes under the names of the published config.json."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_attention_groups: int
    num_hidden_layers: int
    vocab_size: int
    max_seq_len: int = 32768
    rms_norm_eps: float = 1e-5
    bos_token_id: int = 1
    pad_token_id: int = 0
    eos_token_id: int = 3

    def __post_init__(self) -> None:
        for name in SIZES:
            if type(size := getattr(self, name)) is not int or size < 1:
                raise ValueError(f"{name} is {size!r}; it must be a positive whole number")
        if not isinstance(self.rms_norm_eps, int | float) or self.rms_norm_eps <= 0:
            raise ValueError(f"rms_norm_eps is {self.rms_norm_eps!r}; it must be a positive number")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads")
        if self.num_attention_heads % self.num_attention_groups:
            raise ValueError(f"{self.num_attention_heads} heads do not divide into {self.num_attention_groups} groups")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Step1Config:
        """From a config.json's contents; unknown keys are ignored, a missing size is a ValueError that names it."""
        known = {f.name for f in fields(cls)}
        try:
            return cls(**{key: value for key, value in values.items() if key in known})
        except TypeError as error:
            raise ValueError(f"config.json lacks a size of Step1: {error}") from error

    def to_json(self) -> str:
        """The text of a config.json in the published layout."""
        head = {"architectures": ["Step1ForCausalLM"], "model_type": "step1"}
        return json.dumps(head | {f.name: getattr(self, f.name) for f in fields(self)}, indent=2)


class RMSNorm(nn.Module):
    """Root-mean-square norm: the mean of squares in float32, the scaling in the dtype of x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return x * scale.to(x.dtype) * self.weight.to(x.dtype)


class SelfAttention(nn.Module):
    """Grouped-query attention; how queries meet keys is the caller's `attend`."""

    def __init__(self, config: Step1Config) -> None:
        super().__init__()
        self.kv_size = config.num_attention_groups * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.qkv_proj: nn.Module | None = None

    def join(self) -> None:
        """Make one product of the float16 ones that read the same: a small model's step is mostly calls."""
        self.qkv_proj = HalfLinear.joined(self.q_proj, self.k_proj, self.v_proj)
        del self.q_proj, self.k_proj, self.v_proj

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries (..., hidden), keys and values (..., G * D) of x (..., hidden)."""
        if self.qkv_proj is None:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        both: Tensor = self.qkv_proj(x)
        return torch.split(both, [both.shape[-1] - 2 * self.kv_size, self.kv_size, self.kv_size], -1)

    def forward(self, x: Tensor, layer: int, attend: Attend) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.projected(x))
        out: Tensor = self.o_proj(attend(layer, q, k, v).flatten(-2))
        return out


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Step1Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.gate_up_proj: nn.Module | None = None

    def join(self) -> None:
        """The same for gate and up."""
        self.gate_up_proj = HalfLinear.joined(self.gate_proj, self.up_proj)
        del self.gate_proj, self.up_proj

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_up_proj is None:
            wide = F.silu(self.gate_proj(x)) * self.up_proj(x)
        else:
            gate, up = self.gate_up_proj(x).chunk(2, -1)
            wide = F.silu(gate, inplace=True) * up
        out: Tensor = self.down_proj(wide)
        return out


class Layer(nn.Module):
    """One pre-norm residual block."""

    def __init__(self, config: Step1Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, layer: int, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), layer, attend)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Trunk(nn.Module):
    """Embedding, layers and final norm: the tensors under `model.`"""

    def __init__(self, config: Step1Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Step1(nn.Module):
    """The language model.

    - `forward` runs whole (padded or packed) sequences and is what training uses.
    - `prefill` and `decode` run on a KVCache, many slots of different lengths, and return hidden states of the newest
      tokens; `lm_head` (or some rows of it) turns them into logits.
    - `decode_static` is the decode whose shapes never change, for captured CUDA graphs.

    `gradient_checkpointing` recomputes each layer in the backward pass. `attention` is "auto" (flex on a GPU, else
    dense), "flex" or "dense".
    """

    def __init__(self, config: Step1Config) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.attention: Literal["auto", "flex", "dense"] = "auto"
        self.alibi = SqrtAlibi(config.num_attention_heads)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and cache; quantised weights keep the embedding in it."""
        return self.model.embed_tokens.weight.dtype

    def initialise(self, *, std: float = 0.02, seed: int = 0) -> None:
        """Random weights for training from nothing: normal, residual outputs narrower with depth, head small."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        narrow = std / (2 * self.config.num_hidden_layers) ** 0.5
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 1:
                    parameter.fill_(1.0)
                else:
                    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                    parameter.normal_(0.0, narrow if residual else std, generator=generator)

    def join(self) -> None:
        """Make one product of the float16 ones that read the same (`HalfLinear`). For inference alone."""
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            layer.self_attn.join()
            layer.mlp.join()

    def _run(self, x: Tensor, attend: Attend) -> Tensor:
        for index, layer in enumerate(self.model.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, index, attend, use_reentrant=False)
            else:
                x = layer(x, index, attend)
        return x

    def whole_sequences(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Attend:
        """How whole sequences (B, L) attend: flex on a GPU, dense elsewhere, or what `attention` says."""
        shape = (input_ids.shape[0], input_ids.shape[1])
        if self.attention == "flex" or (self.attention == "auto" and input_ids.is_cuda):
            return FlexSequences(self.alibi, shape, document_ids, input_ids.device)
        return WholeSequences(self.alibi, shape, document_ids)

    def hidden_states(
        self, input_ids: Tensor, *, document_ids: Tensor | None = None, attend: Attend | None = None
    ) -> Tensor:
        """Hidden states after the final norm, (B, L) -> (B, L, hidden): `forward` without the head.

        Multiply only the positions that carry a loss with `lm_head`: logits over 74,752 ids are the largest tensor.
        `attend` stands in for `whole_sequences`, e.g. to look at queries and keys while training.
        """
        attend = attend or self.whole_sequences(input_ids, document_ids)
        hidden: Tensor = self.model.norm(self._run(self.model.embed_tokens(input_ids), attend))
        return hidden

    def forward(self, input_ids: Tensor, *, document_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Whole sequences: ids (B, L) -> hidden (B, L, hidden) after the final norm, logits (B, L, vocab).

        Causal. Pad on the right (padding never reaches earlier tokens; mask its loss). To pack several documents in a
        row give `document_ids` (B, L): runs of equal ids see only themselves, and positions are relative anyway. Give
        padding an id of its own.
        """
        hidden = self.hidden_states(input_ids, document_ids=document_ids)
        return hidden, self.lm_head(hidden)

    def new_cache(self, *, slots: int, capacity: int, zeroed: bool = False) -> KVCache:
        """An empty cache for `slots` sequences of at most `capacity` tokens, in the dtype and device of the weights."""
        c = self.config
        return KVCache(
            c.num_hidden_layers, c.num_attention_groups, c.head_dim, slots=slots, capacity=capacity,
            dtype=self.dtype, device=self.device, zeroed=zeroed,
        )  # fmt: skip

    @property
    def chunk(self) -> int:
        """Prompt tokens per prefill pass: a multiple of it is where a cached prefix may end."""
        return CPU_CHUNK if self.device.type == "cpu" else CUDA_CHUNK

    @torch.no_grad()
    def prefill(self, token_ids: Tensor, cache: KVCache, slot: int) -> Tensor:
        """Append a prompt (n,) to a slot; hidden state of its last token, (hidden,).

        Runs in chunks that end at multiples of `chunk`, so memory beside weights and cache stays under
        chunk x (3 intermediate + 6 hidden) elements, and on a GPU one bias block of H x chunk x context elements
        (48 heads, 8192 tokens, bf16: 384 MiB); on a CPU the bias is a view and costs nothing. Int8 weights take one
        matrix in the working dtype on top.
        """
        cache.room(slot, len(token_ids))
        ids = token_ids.to(self.device)
        hidden = self.model.embed_tokens.weight.new_zeros(self.config.hidden_size)
        done = 0
        while done < len(ids):
            start = cache.lengths[slot]
            count = min(self.chunk - start % self.chunk, len(ids) - done)
            x = self.model.embed_tokens(ids[None, done : done + count])
            x = self._run(x, CachedPrefill(cache, slot, start, count, self.alibi))
            cache.lengths[slot] += count
            done += count
            hidden = x[0, -1]
        normed: Tensor = self.model.norm(hidden)
        return normed

    @torch.no_grad()
    def decode(self, token_ids: Tensor, cache: KVCache, slots: Sequence[int], *, rows: int = 1) -> Tensor:
        """One token (B,) for each of the slots -> hidden states of those tokens, (B, hidden).

        The batch is padded to a multiple of `rows`: matrix products of padded heights give every row the same bits
        whatever else is in the batch (see services.llm.engine for how the multiple is found). Bias: O(length) per head.
        """
        for slot in slots:
            cache.room(slot, 1)
        padded = F.pad(token_ids.to(self.device), (0, -len(slots) % rows))
        x = self.model.embed_tokens(padded)[:, None]
        x = self._run(x, CachedDecode(cache, slots, self.alibi))
        for slot in slots:
            cache.lengths[slot] += 1
        hidden: Tensor = self.model.norm(x[:, 0])
        return hidden[: len(slots)]

    @torch.no_grad()
    def decode_static(self, token_ids: Tensor, positions: Tensor, cache: KVCache, span: int) -> Tensor:
        """One token (S,) for EVERY slot, written at positions (S,), over `span` keys -> hidden (S, hidden).

        Shapes depend on (S, span) alone and nothing is read back, so the call can be captured. The cache must be
        zeroed, span above every position that counts; the caller advances `cache.lengths`. A slot that takes no part
        gets any token and a position that no sequence uses.
        """
        x = self.model.embed_tokens(token_ids)[:, None]
        attend = StaticDecode(cache, positions, span, self.alibi.slopes_on(self.device))
        hidden: Tensor = self.model.norm(self._run(x, attend)[:, 0])
        return hidden
