"""Chats to training tensors: ids with a loss mask, padded or packed. Knows the chat format, not what is learned.

A packed row holds several chats one after the other; `document_ids` keep each to itself, and positions are relative, so
a packed row trains exactly as its chats would in padded rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.codes import LINGUISTIC_SIZE, SEMANTIC_SIZE
from shared.prompts import TextTokenizer, Turn, assistant_turn

PAD = 0


@dataclass(frozen=True, eq=False)
class Encoded:
    """One chat: ids (n,), and the start of the answer's audio tokens; the answer and its end token run to the end."""

    ids: npt.NDArray[np.int64]
    answer: int

    @property
    def answer_tokens(self) -> int:
        """Tokens that carry a loss: the answer's audio and the end of its turn."""
        return len(self.ids) - self.answer

    def mask(self) -> npt.NDArray[np.float32]:
        """1 for the answer's audio tokens and its end, 0 for everything before, (n,)."""
        mask = np.zeros(len(self.ids), np.float32)
        mask[self.answer :] = 1
        return mask


def encode(tokenizer: TextTokenizer, turns: Sequence[Turn], mixed: npt.ArrayLike) -> Encoded:
    """A chat with its answer. The role line of the assistant's turn is given, not learned."""
    prompt = tokenizer.encode_chat(turns)
    return join(prompt, np.asarray(mixed), tokenizer)


def join(
    prompt: Sequence[int] | npt.NDArray[np.int64], mixed: npt.NDArray[np.integer], tokenizer: TextTokenizer
) -> Encoded:
    """Prompt ids and audio tokens (n,) as one chat: the same ids as encoding the whole chat at once."""
    ids = np.concatenate(
        [np.asarray(prompt, np.int64), tokenizer.audio_ids(mixed), np.array([tokenizer.eos], np.int64)]
    )
    return Encoded(ids, len(prompt))


def whole_chat(tokenizer: TextTokenizer, turns: Sequence[Turn], mixed: npt.ArrayLike) -> list[int]:
    """The same chat by the chat encoder alone, which `encode` is tested against."""
    return tokenizer.encode_chat([*turns, assistant_turn(mixed)], False)


@dataclass(frozen=True, eq=False)
class Batch:
    """ids (B, L), weights (B, L) of each token as a target, document_ids (B, L) or None, tokens that carry a loss."""

    ids: Tensor
    weights: Tensor
    document_ids: Tensor | None
    answer_tokens: int

    def to(self, device: torch.device | str) -> Batch:
        documents = None if self.document_ids is None else self.document_ids.to(device)
        return Batch(self.ids.to(device), self.weights.to(device), documents, self.answer_tokens)


def padded(chats: Sequence[Encoded]) -> Batch:
    """One chat a row, padded on the right."""
    longest = max(len(chat.ids) for chat in chats)
    ids, weights = torch.full((len(chats), longest), PAD), torch.zeros(len(chats), longest)
    for row, chat in enumerate(chats):
        ids[row, : len(chat.ids)] = torch.from_numpy(chat.ids)
        weights[row, : len(chat.ids)] = torch.from_numpy(chat.mask())
    return Batch(ids, weights, None, sum(chat.answer_tokens for chat in chats))


def packed(rows: Sequence[Sequence[Encoded]]) -> Batch:
    """Several chats a row; the padding at a row's end is a document of its own."""
    longest = max(sum(len(chat.ids) for chat in row) for row in rows)
    ids, weights = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest)
    documents = torch.full((len(rows), longest), -1)
    for number, row in enumerate(rows):
        start = 0
        for document, chat in enumerate(row):
            stop = start + len(chat.ids)
            ids[number, start:stop] = torch.from_numpy(chat.ids)
            weights[number, start:stop] = torch.from_numpy(chat.mask())
            documents[number, start:stop] = document
            start = stop
    return Batch(ids, weights, documents, sum(chat.answer_tokens for row in rows for chat in row))


def replaced(ids: Tensor, offset: int, share: float, rng: np.random.Generator) -> Tensor:
    """The ids with a share of their codes replaced by codes of the same kind, so that a model learns to go on after its
    own mistakes. `offset` is the id of mixed id 0."""
    code = ids.numpy() - offset
    other = np.where(code < LINGUISTIC_SIZE, rng.integers(LINGUISTIC_SIZE, size=code.shape),
                     LINGUISTIC_SIZE + rng.integers(SEMANTIC_SIZE, size=code.shape))  # fmt: skip
    chosen = (code >= 0) & (rng.random(code.shape) < share)
    return torch.from_numpy(np.where(chosen, other, code) + offset)


def plan_rows(lengths: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    """Which items share a row of `capacity` tokens: first fit among the newest eight rows, in the given order.

    Raises ValueError naming an item longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for item in order:
        if lengths[item] > capacity:
            raise ValueError(f"item {item} has {lengths[item]} tokens, a row takes {capacity}")
        newest = range(max(0, len(rows) - 8), len(rows))
        place = next((row for row in newest if room[row] >= lengths[item]), None)
        if place is None:
            rows.append([])
            room.append(capacity)
            place = len(rows) - 1
        rows[place].append(item)
        room[place] -= lengths[item]
    return rows


def epoch_order(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of one epoch: a function of the seed and the epoch alone, so a resumed run reads what it would have."""
    return np.random.default_rng((seed, epoch)).permutation(count)
