"""Square-root ALiBi for vLLM on a CPU, plain and slow, so that a test can run Step1 there.

vLLM has it for GPUs only (its Triton kernels). Keys and values lie in a tensor of this backend's own, by vLLM's slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend


class SqrtAlibiImpl(CPUAttentionBackendImpl):  # type: ignore[misc]
    def __init__(self, *args: Any, use_alibi_sqrt: bool = False, **settings: Any) -> None:
        super().__init__(*args, **settings)
        assert use_alibi_sqrt
        self.kept: Tensor | None = None

    def do_kv_cache_update(
        self, layer: object, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if self.kept is None:
            blocks, heads, block, width = kv_cache.shape
            self.kept = torch.zeros(blocks * block, 2, heads, width // 2)
        self.kept[slot_mapping.long()] = torch.stack([key, value], dim=1)[: len(slot_mapping)]

    def forward(
        self, layer: object, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
        output: Tensor, output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if attn_metadata is None:
            return output
        assert self.kept is not None
        block, shared = kv_cache.shape[2], self.num_heads // self.num_kv_heads
        starts, lengths = attn_metadata.query_start_loc.tolist(), attn_metadata.seq_lens.tolist()
        for row, length in enumerate(lengths):
            places = torch.arange(length)
            table = attn_metadata.block_table[row].long()
            keys, values = self.kept[table[places // block] * block + places % block].unbind(1)
            asked = query[starts[row] : starts[row + 1]]
            behind = torch.arange(length - len(asked), length)[:, None] - places  # how far each key lies behind
            bias = -self.alibi_slopes[:, None, None] * behind.clamp(min=0).sqrt()
            scores = torch.einsum("qhd,khd->hqk", asked, keys.repeat_interleave(shared, 1)) * self.scale + bias
            weights = scores.masked_fill(behind < 0, -torch.inf).softmax(-1)
            mixed = torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(shared, 1))
            output[starts[row] : starts[row + 1]] = mixed.view(output[starts[row] : starts[row + 1]].shape)
        return output


class SqrtAlibiBackend(CPUAttentionBackend):  # type: ignore[misc]
    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> type[SqrtAlibiImpl]:
        return SqrtAlibiImpl


def install() -> None:
    """Have vLLM take this for its attention on CPUs."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.SqrtAlibiBackend")
