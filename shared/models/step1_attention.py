"""Square-root ALiBi and the ways in which Step1 attends: whole sequences, prefill into a cache, decode from a cache.

Positions enter only as the additive bias -slope[h] * sqrt(i - j). The bias of a causal block is a Toeplitz matrix, so
it is kept as one row per head and read through an overlapping strided view: nothing of size heads x L x L is ever built
on a CPU. This file knows nothing about weights, sampling or prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


def alibi_slopes(num_heads: int) -> Tensor:
    """Slopes of the heads, (H,) float32: the powers for the largest power of two, then every other one of the next."""
    whole = 2 ** int(math.log2(num_heads))
    base = 2.0 ** (-8.0 / whole)
    slopes = [base**k for k in range(1, whole + 1)]
    base = 2.0 ** (-4.0 / whole)
    slopes += [base**k for k in range(1, 2 * (num_heads - whole), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")


class SqrtAlibi:
    """The bias of every head as one row: row[m] = -slope * sqrt(span - 1 - m) for m < span, -inf beyond.

    The bias between query i and key j stands at m = span - 1 - (i - j). With the queries in reverse order both indices
    count upwards, so a block of the bias is a view with strides (1, 1) into the row: memory is O(H x span).
    """

    def __init__(self, num_heads: int) -> None:
        self.slopes = alibi_slopes(num_heads)
        self._span = 0
        self._rows: Tensor | None = None

    def _grown(self, span: int, device: torch.device) -> Tensor:
        if self._rows is None or span > self._span or self._rows.device != device:
            self._span = max(1024, 1 << (span - 1).bit_length())
            with torch.inference_mode(False):  # the rows outlive this call and may serve training
                distances = torch.arange(self._span - 1, -1, -1, dtype=torch.float32, device=device).sqrt()
                self._rows = F.pad(-self.slopes_on(device)[:, None] * distances, (0, self._span), value=-torch.inf)
        return self._rows

    def slopes_on(self, device: torch.device) -> Tensor:
        """The slopes (H,) on a device, copied there once."""
        if self.slopes.device != device:
            with torch.inference_mode(False):
                self.slopes = self.slopes.to(device)
        return self.slopes

    def reversed_block(self, start: int, count: int, device: torch.device) -> Tensor:
        """Bias of queries start..start+count-1 in REVERSE order over keys 0..start+count-1, (1, H, count, keys)."""
        keys = start + count
        rows = self._grown(keys, device)
        shape, strides = (1, rows.shape[0], count, keys), (0, rows.stride(0), 1, 1)
        return rows.as_strided(shape, strides, self._span - keys)

    def last_row(self, keys: int, device: torch.device) -> Tensor:
        """Bias of the newest query over all keys, (H, keys): a view, nothing is computed."""
        return self._grown(keys, device)[:, self._span - keys : self._span]


class Attend(Protocol):
    """What a layer asks for: q (B, L, H, D), k and v (B, L, G, D) of this layer -> (B, L, H, D)."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def _by_group(x: Tensor, groups: int) -> Tensor:
    """Heads next to their KV group, (N, H, ...) -> (N, G, H / G, ...)."""
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])


def attend_block(q: Tensor, k: Tensor, v: Tensor, reversed_bias: Tensor) -> Tensor:
    """q (B, H, C, D) over k, v (B, G, N, D) with the bias of the reversed queries; -> (B, H, C, D)."""
    if q.is_cuda:  # the fused kernel with a bias wants equal head counts
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q.flip(2), k, v, attn_mask=reversed_bias, enable_gqa=grouped).flip(2)


QUERY_BLOCK = 96
"""Queries that attend at once in `_attend_in_blocks`, which so skips most of the future."""


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, biases: Sequence[Tensor]) -> Tensor:
    """Causal attention by plain products, q (B, H, L, D) over k, v (B, G, L, D); -> (B, H, L, D).

    For training in bfloat16 on a CPU, where this is three times as fast, forward and backward, as
    scaled_dot_product_attention with a bias (torch 2.13, 8 x 8 heads x 350 tokens: 20 against 61 ms), and rounds the
    scores to bfloat16. A block's bias is (1, H, C, keys).
    """
    batch, heads, _, width = q.shape
    groups = k.shape[1]
    parts, start = [], 0
    for bias in biases:
        count, keys = bias.shape[2:]
        query = (q[:, :, start:keys] * width**-0.5).reshape(batch, groups, heads // groups * count, width)
        scores = (query @ k[:, :, :keys].transpose(2, 3)).add_(bias.reshape(1, groups, -1, keys))
        parts.append((scores.softmax(-1).to(v.dtype) @ v[:, :, :keys]).view(batch, heads, count, width))
        start = keys
    return torch.cat(parts, dim=2)


class WholeSequences:
    """Causal attention over full rows, each document of a packed row on its own. For training and scoring without flex.

    Built once per forward and shared by all layers. On a CPU the bias is a view; on a GPU one (H, L, L) block of the
    longest document is materialised in the working dtype (48 heads, 2048 tokens, bf16: 384 MiB), which flex avoids; so
    is the visible half of it for training in bfloat16 on a CPU.
    """

    def __init__(self, alibi: SqrtAlibi, shape: tuple[int, int], document_ids: Tensor | None) -> None:
        self.alibi = alibi
        batch, length = shape
        if document_ids is None:
            self.spans = [(slice(0, batch), 0, length)]
        else:
            self.spans = [(slice(row, row + 1), *span) for row in range(batch) for span in _runs(document_ids[row])]
        self._longest = max(stop - start for _, start, stop in self.spans)
        self._block: Tensor | None = None
        self._blocks: dict[int, list[Tensor]] = {}

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        if q.is_cuda or q.dtype is not torch.bfloat16 or not q.requires_grad:
            return attend_block(q, k, v, self._bias(length, q))
        if length not in self._blocks:
            starts = range(0, length, QUERY_BLOCK)
            ends = [min(start + QUERY_BLOCK, length) for start in starts]
            self._blocks[length] = [
                self.alibi.reversed_block(start, end - start, q.device).flip(2).to(q.dtype)
                for start, end in zip(starts, ends, strict=True)
            ]
        return _attend_in_blocks(q, k, v, self._blocks[length])

    def _bias(self, length: int, like: Tensor) -> Tensor:
        if not like.is_cuda:
            return self.alibi.reversed_block(0, length, like.device)
        if self._block is None:
            self._block = self.alibi.reversed_block(0, self._longest, like.device).to(like.dtype).contiguous()
        return self._block[:, :, self._longest - length :, :length]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, L, D)
        parts = []
        for rows, start, stop in self.spans:
            piece_q, piece_k, piece_v = (x[rows, :, start:stop] for x in (q, k, v))
            parts.append(self._attend(piece_q, piece_k, piece_v))
        if len(parts) == 1:
            return parts[0].transpose(1, 2)
        packed = torch.cat([part[0] for part in parts], dim=1)  # (H, B*L, D)
        return packed.transpose(0, 1).reshape(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


def _runs(ids: Tensor) -> list[tuple[int, int]]:
    """Start and stop of every run of equal ids, (L,) -> [(start, stop)]."""
    counts = torch.unique_consecutive(ids, return_counts=True)[1].tolist()
    stops = torch.tensor(counts).cumsum(0).tolist()
    return [(stop - count, stop) for count, stop in zip(counts, stops, strict=True)]


@cache
def _compiled_flex() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention), create_block_mask


class FlexSequences:
    """The same attention as WholeSequences inside one fused GPU kernel: the bias is arithmetic on indices, O(L) memory.

    Blocks of other documents and of the future are skipped. The block mask is built once per forward.
    """

    def __init__(
        self, alibi: SqrtAlibi, shape: tuple[int, int], document_ids: Tensor | None, device: torch.device
    ) -> None:
        self._flex, create_block_mask = _compiled_flex()
        batch, length = shape
        documents = document_ids if document_ids is not None else torch.zeros(batch, length, device=device)
        slopes = alibi.slopes_on(device)

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (documents[b, i] == documents[b, j])

        def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score - slopes[h] * (i - j).clamp(min=0).to(torch.float32).sqrt()

        self._score = biased
        self._mask = create_block_mask(visible, batch, None, length, length, device=str(device))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        out: Tensor = self._flex(q, k, v, score_mod=self._score, block_mask=self._mask, enable_gqa=grouped)
        return out.transpose(1, 2)


class KVCache:
    """Keys and values of `slots` independent sequences, preallocated: (layers, slots, G, capacity, D) each.

    A sequence costs 2 x layers x G x D elements per token (32 KiB for the official 3B release in bf16). On a CPU the
    pages are touched only as they fill. `lengths[slot]` is how many tokens a slot holds. With `zeroed`, slots may be
    read beyond their length, as the static decode does.
    """

    def __init__(
        self, layers: int, groups: int, head_dim: int, *, slots: int, capacity: int, dtype: torch.dtype,
        device: torch.device | str = "cpu", zeroed: bool = False,
    ) -> None:  # fmt: skip
        make = torch.zeros if zeroed else torch.empty
        shape = (layers, slots, groups, capacity, head_dim)
        self.keys = make(shape, dtype=dtype, device=device)
        self.values = make(shape, dtype=dtype, device=device)
        self.lengths = [0] * slots
        self.capacity = capacity

    def snapshot(self, slot: int, start: int, stop: int) -> Tensor:
        """A copy of the tokens start..stop-1 of a slot, (2, layers, G, stop - start, D)."""
        return torch.stack([self.keys[:, slot, :, start:stop], self.values[:, slot, :, start:stop]])

    def restore(self, slot: int, start: int, block: Tensor) -> None:
        """Put a snapshot back at `start` and let the slot end behind it."""
        stop = start + block.shape[3]
        self.keys[:, slot, :, start:stop], self.values[:, slot, :, start:stop] = block[0], block[1]
        self.lengths[slot] = stop

    def room(self, slot: int, count: int) -> None:
        """Raise ValueError when `count` more tokens do not fit in the slot."""
        if self.lengths[slot] + count > self.capacity:
            raise ValueError(
                f"slot {slot} holds {self.lengths[slot]} of {self.capacity} tokens, {count} more do not fit: "
                "shorten the prompt or raise the cache capacity"
            )


class CachedPrefill:
    """One chunk of a prompt: writes its keys and values at start, attends over everything up to its end."""

    def __init__(self, cache: KVCache, slot: int, start: int, count: int, alibi: SqrtAlibi) -> None:
        self.cache, self.slot, self.start, self.stop = cache, slot, start, start + count
        self.bias = alibi.reversed_block(start, count, cache.keys.device)
        if self.bias.is_cuda:
            self.bias = self.bias.to(cache.keys.dtype).contiguous()  # (1, H, count, stop), shared by all layers

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer, self.slot], self.cache.values[layer, self.slot]
        keys[:, self.start : self.stop] = k[0].transpose(0, 1)
        values[:, self.start : self.stop] = v[0].transpose(0, 1)
        seen_k, seen_v = keys[None, :, : self.stop], values[None, :, : self.stop]
        return attend_block(q.transpose(1, 2), seen_k, seen_v, self.bias).transpose(1, 2)


class CachedDecode:
    """One new token for each of some slots, every slot over exactly its own length.

    Slots of one length that lie evenly apart attend in one call, as the answers to one prompt do; each is computed by
    itself there, with the same shapes whoever else is in the batch: its result is bit-equal alone and in company.
    The query heads of a KV group stand as rows of one small matrix, so each key is read once per group, not per head.
    Rows of the batch beyond the slots are padding and come back as zeros.
    """

    def __init__(self, cache: KVCache, slots: Sequence[int], alibi: SqrtAlibi) -> None:
        self.cache = cache
        device = cache.keys.device
        groups = cache.keys.shape[2]
        row_of = {slot: row for row, slot in enumerate(slots)}
        self.parts: list[tuple[slice | Tensor, slice, int, Tensor]] = []
        for length, chosen in _alike(slots, cache.lengths):
            in_order = [row_of[slot] for slot in chosen]
            rows = _slice(in_order) if _are_even(in_order) else torch.tensor(in_order, device=device)
            bias = _by_group(alibi.last_row(length + 1, device)[None], groups)
            self.parts.append((rows, _slice(chosen), length, bias))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        out = torch.zeros_like(q)
        for rows, slots, place, bias in self.parts:
            keys[slots, :, place], values[slots, :, place] = k[rows, 0], v[rows, 0]
            query = _by_group(q[rows, 0], keys.shape[1])  # (n, G, R, D)
            result = F.scaled_dot_product_attention(
                query, keys[slots, :, : place + 1], values[slots, :, : place + 1], attn_mask=bias
            )
            out[rows, 0] = result.flatten(1, 2)
        return out


def _alike(slots: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Slots of one length that lie evenly apart, in rising order, with that length."""
    found: list[tuple[int, list[int]]] = []
    for slot in sorted(slots, key=lambda slot: (lengths[slot], slot)):
        length, last = found[-1] if found else (-1, [])
        if length == lengths[slot] and (len(last) == 1 or slot - last[-1] == last[1] - last[0]):
            last.append(slot)
        else:
            found.append((lengths[slot], [slot]))
    return found


def _are_even(numbers: Sequence[int]) -> bool:
    """Whether numbers rise evenly."""
    steps = {later - earlier for earlier, later in pairwise(numbers)}
    return not steps or (len(steps) == 1 and min(steps) > 0)


def _slice(numbers: Sequence[int]) -> slice:
    """Numbers that rise evenly as a slice."""
    return slice(numbers[0], numbers[-1] + 1, numbers[1] - numbers[0] if len(numbers) > 1 else 1)


class StaticDecode:
    """One new token for every slot at tensor positions, always over `span` keys: no shape depends on the data.

    That makes the step fit for a captured CUDA graph. The bias costs (slots, H, span) elements once per step, shared by
    all layers. Needs a zeroed cache, because unused keys are multiplied by zero weights.
    """

    def __init__(self, cache: KVCache, positions: Tensor, span: int, slopes: Tensor) -> None:
        self.cache, self.positions, self.span = cache, positions, span
        groups = cache.keys.shape[2]
        distance = positions[:, None] - torch.arange(span, device=positions.device)  # (S, span)
        row = torch.where(distance >= 0, -distance.clamp(min=0).to(torch.float32).sqrt(), -torch.inf)
        bias = row[:, None, :] * slopes[None, :, None]
        self.bias = _by_group(bias, groups).to(cache.keys.dtype)  # (S, G, R, span)
        self.rows = torch.arange(positions.shape[0], device=positions.device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows, :, self.positions], values[self.rows, :, self.positions] = k[:, 0], v[:, 0]
        query = _by_group(q[:, 0], keys.shape[1])  # (S, G, R, D)
        result = F.scaled_dot_product_attention(
            query, keys[:, :, : self.span], values[:, :, : self.span], attn_mask=self.bias
        )
        return result.flatten(1, 2)[:, None]
