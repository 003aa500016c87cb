"""A bounded cache of prompt prefixes: keys and values by the tokens that made them.

A prompt is cut into blocks; a block is found by the hash of itself and everything before it, so prompts that begin
alike share blocks. The end of each whole prompt is kept too, with the hidden state of its last token: the same prompt
again (the next of N candidates) costs no prefill. Knows the layout of a KVCache and nothing about models.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from shared.models.step1_attention import KVCache
from shared.tallies import looked_up

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Entry:
    block: Tensor
    tokens: int
    last_hidden: Tensor | None = None


class PrefixCache:
    """Blocks of `block` tokens, at most `max_tokens` tokens in all; the least recently used go first.

    `block` must be the prefill chunk of the model: then a restored prefix holds the very bits that prefill would
    compute, because its chunks end at the same places.
    """

    def __init__(self, max_tokens: int, block: int) -> None:
        self._max_tokens = max_tokens
        self._block = block
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self.tokens = 0
        self.hits = 0
        self.misses = 0

    def _pieces(self, prompt: Ids) -> Iterator[tuple[bytes, int, int]]:
        """Key, start and stop of every full block, then of the end of the prompt (which may hold no token)."""
        key = b""
        full = len(prompt) // self._block * self._block
        for start in range(0, full, self._block):
            stop = start + self._block
            key = hashlib.blake2b(key + prompt[start:stop].tobytes(), digest_size=16).digest()
            yield key, start, stop
        end = hashlib.blake2b(b"end" + key + prompt[full:].tobytes(), digest_size=16).digest()
        yield end, full, len(prompt)

    def restore(self, prompt: Ids, cache: KVCache, slot: int) -> Tensor | None:
        """Fill an empty slot with the longest known prefix; the hidden state of the last token if all is known.

        `cache.lengths[slot]` says how much was restored; at least one token is left to compute unless all is known.
        """
        cache.lengths[slot] = 0
        found: list[tuple[bytes, int]] = []
        hidden = None
        for key, start, _ in self._pieces(prompt):
            entry = self._entries.get(key)
            if entry is None:
                break
            found.append((key, start))
            hidden = entry.last_hidden
        if found and hidden is None and found[-1][1] + self._block >= len(prompt):
            found.pop()
        for key, start in found:
            cache.restore(slot, start, self._entries[key].block)
        for key, _ in reversed(found):  # the start of a prompt ends up most recently used
            self._entries.move_to_end(key)
        hits = cache.lengths[slot]
        self.hits += hits
        self.misses += len(prompt) - hits
        looked_up("prompt tokens", hits=hits, misses=len(prompt) - hits)
        return hidden

    def store(self, prompt: Ids, cache: KVCache, slot: int, last_hidden: Tensor) -> None:
        """Remember a prompt that a slot holds, with the hidden state of its last token."""
        if len(prompt) > self._max_tokens:
            return
        for key, start, stop in self._pieces(prompt):
            if key not in self._entries:
                is_end = stop == len(prompt) and stop - start < self._block
                entry = _Entry(cache.snapshot(slot, start, stop), stop - start, last_hidden.clone() if is_end else None)
                self._entries[key] = entry
                self.tokens += entry.tokens
        while self.tokens > self._max_tokens:
            self.tokens -= self._entries.popitem(last=False)[1].tokens
