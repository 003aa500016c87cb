"""One decode step for all running sequences, in the two forms that devices want, with the same bits in any company.

On a CPU each slot attends over exactly its own length, and only the matrix products see the whole batch. Their rows
could come out differently for different heights, so the height is padded to a multiple for which they do not; the
multiple is measured on the model's own layers. On a GPU every slot always takes part and shapes never change, so a step
is captured once as a CUDA graph. Knows nothing about sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.models.quantize import output_rows
from shared.models.step1 import Layer, Step1
from shared.models.step1_attention import KVCache

SPAN = 1024


class Decoder(Protocol):
    """Runs one step: the newest token of each slot in, logits over `choices` out."""

    cache: KVCache

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, hidden) to logits (B, choices), float32."""
        ...

    def step(self, tokens: Sequence[int], slots: Sequence[int]) -> Tensor:
        """Hidden states (B, hidden) of one more token for each of the slots."""
        ...


def _alike(probe: Callable[[Tensor], Tensor], x: Tensor, multiple: int) -> bool:
    """Whether every multiple of a height, and another order of rows, gives each row the same bits as all of x."""
    whole = probe(x)
    heights = range(multiple, len(x), multiple)
    turned = torch.roll(probe(torch.roll(x, 1, dims=0)), -1, dims=0)
    return torch.equal(turned, whole) and all(torch.equal(probe(x[:n]), whole[:n]) for n in heights)


@torch.inference_mode()
def row_multiple(model: Step1, head: nn.Module, slots: int) -> int:
    """The smallest m such that batches padded to multiples of m give every row the same bits, up to `slots` rows.

    Measured on the norms and products of the first layer and the head. Falls back to `slots` rounded up to 24, which
    all multiples divide: one height for all batches. Typically 1 for int8, 2 for bf16, 3 for float16 weights and 4 for
    float32 on a CPU.
    """
    fixed = -(-slots // 24) * 24
    layer = model.model.layers[0]
    assert isinstance(layer, Layer)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(fixed, model.config.hidden_size, generator=generator).to(model.device, model.dtype)
    attention = layer.self_attn

    def read(x: Tensor) -> Tensor:
        return torch.cat(attention.projected(layer.input_layernorm(x)), -1)

    write = nn.Sequential(attention.o_proj, layer.post_attention_layernorm, layer.mlp)
    probes: list[Callable[[Tensor], Tensor]] = [read, write, head]
    for multiple in (1, 2, 3, 4, 6, 8):
        if all(_alike(probe, x, multiple) for probe in probes):
            return multiple
    return fixed


class ExactDecoder:
    """For CPUs: work in proportion to the running sequences and their lengths."""

    def __init__(self, model: Step1, choices: Tensor, *, slots: int, capacity: int) -> None:
        self.cache = model.new_cache(slots=slots, capacity=capacity)
        self._model = model
        self._head = output_rows(model.lm_head, choices)
        self.rows = row_multiple(model, self._head, slots)

    def logits(self, hidden: Tensor) -> Tensor:
        padded = F.pad(hidden, (0, 0, 0, -len(hidden) % self.rows))
        out: Tensor = self._head(padded)
        return out[: len(hidden)].float()

    def step(self, tokens: Sequence[int], slots: Sequence[int]) -> Tensor:
        return self._model.decode(torch.tensor(tokens), self.cache, slots, rows=self.rows)


class StaticDecoder:
    """For GPUs: all slots in every step over a span rounded up to 1024 keys; one captured graph per span.

    Slots that do not take part write to the cache's last position, which no sequence uses.
    """

    def __init__(self, model: Step1, choices: Tensor, *, slots: int, capacity: int) -> None:
        self.cache = model.new_cache(slots=slots, capacity=(capacity // SPAN + 1) * SPAN, zeroed=True)
        self._model = model
        self._head = output_rows(model.lm_head, choices)
        self._tokens = torch.zeros(slots, dtype=torch.long, device=model.device)
        self._positions = torch.zeros(slots, dtype=torch.long, device=model.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def logits(self, hidden: Tensor) -> Tensor:
        padded = F.pad(hidden, (0, 0, 0, len(self._tokens) - len(hidden)))
        out: Tensor = self._head(padded)
        return out[: len(hidden)].float()

    def step(self, tokens: Sequence[int], slots: Sequence[int]) -> Tensor:
        count, unused = len(self._tokens), self.cache.capacity - 1
        all_tokens, positions = [0] * count, [unused] * count
        for token, slot in zip(tokens, slots, strict=True):
            self.cache.room(slot, 2)
            all_tokens[slot], positions[slot] = token, self.cache.lengths[slot]
            self.cache.lengths[slot] += 1
        self._tokens.copy_(torch.tensor(all_tokens))
        self._positions.copy_(torch.tensor(positions))
        longest = max(self.cache.lengths[slot] for slot in slots)
        hidden = self._run(-(-longest // SPAN) * SPAN)
        return hidden[torch.tensor(list(slots), device=hidden.device)]

    def _run(self, span: int) -> Tensor:
        if self._tokens.device.type != "cuda":
            return self._model.decode_static(self._tokens, self._positions, self.cache, span)
        if span not in self._graphs:
            side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # a first run outside the graph warms the allocator
                self._model.decode_static(self._tokens, self._positions, self.cache, span)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                hidden = self._model.decode_static(self._tokens, self._positions, self.cache, span)
            self._graphs[span] = graph, hidden
        graph, hidden = self._graphs[span]
        graph.replay()
        return hidden
