"""Several answers to one prompt as one row, the prompt read once: half the work of a row for each.

Knows nothing about what is learned from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.trainer.core.sampling import Ids, Vocabulary
from shared.codes import Codes
from shared.models.step1 import Step1
from shared.models.step1_attention import SqrtAlibi, attend_block


@dataclass(frozen=True, eq=False)
class Branches:
    """A prompt and what follows it.

    ids (1, n + K L): the prompt, then K answers of L tokens each, filled up with end tokens; wanted (K, L) the ids of
    the answers; mask (K, L), 1 for an answer's tokens and its end.
    """

    ids: Tensor
    wanted: Tensor
    mask: Tensor

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self.ids.shape[1] - self.wanted.numel()


def branches(prompt: Ids, answers: Sequence[Codes], vocabulary: Vocabulary, device: torch.device | str) -> Branches:
    """One row of a prompt (n,) and mixed ids (m_k,) of its answers; each answer gets its end token."""
    longest = max(len(answer) for answer in answers) + 1
    wanted = torch.full((len(answers), longest), vocabulary.eos)
    mask = torch.zeros(len(answers), longest)
    for row, answer in enumerate(answers):
        wanted[row, : len(answer)] = torch.from_numpy(answer).long() + vocabulary.offset
        mask[row, : len(answer) + 1] = 1
    ids = torch.cat([torch.from_numpy(prompt), wanted.reshape(-1)])[None]
    return Branches(ids.to(device), wanted.to(device), mask.to(device))


def states_before(model: Step1, row: Branches) -> Tensor:
    """Hidden states from which each token of the answers is predicted, (K, L, hidden)."""
    start, (count, length) = row.prompt, row.wanted.shape
    attend = _Attend(model.alibi, start, count, length, row.ids.device)
    hidden = model.hidden_states(row.ids, attend=attend)[0]
    answers = hidden[start:].unflatten(0, (count, length))
    return torch.cat([hidden[start - 1].expand(count, 1, -1), answers[:, :-1]], 1)


class _Attend:
    """The prompt sees itself, each answer the prompt and itself."""

    def __init__(self, alibi: SqrtAlibi, start: int, count: int, length: int, device: torch.device) -> None:
        self._start, self._count = start, count
        self._bias_of_prompt = alibi.reversed_block(0, start, device)
        self._bias_of_answers = alibi.reversed_block(start, length, device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, N, H, D), k and v (1, N, G, D) -> (1, N, H, D)."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        first_q, first_k, first_v = (x[:, :, : self._start] for x in (q, k, v))
        prompt = attend_block(first_q, first_k, first_v, self._bias_of_prompt.to(q.dtype))
        seen_k, seen_v = (
            torch.cat([first.expand(self._count, -1, -1, -1), self._branched(x)], 2)
            for first, x in ((first_k, k), (first_v, v))
        )
        answers = attend_block(self._branched(q), seen_k, seen_v, self._bias_of_answers.to(q.dtype))
        joined = torch.cat([prompt, answers.transpose(0, 1).flatten(1, 2)[None]], 2)
        return joined.transpose(1, 2)

    def _branched(self, x: Tensor) -> Tensor:
        """The answers' part of (1, H, N, D), one a row: (K, H, L, D)."""
        answers = x[0, :, self._start :]
        return answers.reshape(len(answers), self._count, -1, answers.shape[-1]).transpose(0, 1)
