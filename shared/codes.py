"""The dual codebook: linguistic and semantic codes, their 2:3 interleaving into audio tokens, and their common clock.

Linguistic codes run at 16.7 Hz, semantic codes at 25 Hz, so two of the former and three of the latter cover the same
120 ms: a group [l l s s s]. Mixed ids are linguistic c -> c and semantic c -> 1024 + c. Knows nothing about models,
audio or text; works on numpy arrays, and imports torch only where a function takes tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shared.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Codes = npt.NDArray[np.int32]

LINGUISTIC_SIZE = 1024
SEMANTIC_SIZE = 4096
LINGUISTIC_PAD = 1024
AUDIO_VOCAB = LINGUISTIC_SIZE + SEMANTIC_SIZE
LINGUISTIC_PER_GROUP = 2
SEMANTIC_PER_GROUP = 3
GROUP = LINGUISTIC_PER_GROUP + SEMANTIC_PER_GROUP
GROUP_S = 0.12
SEMANTIC_RATE_HZ = 25.0
LINGUISTIC_RATE_HZ = LINGUISTIC_PER_GROUP / GROUP_S

_HINT = "Audio tokens are groups of two linguistic ids (0..1023) and three semantic ids (1024..5119)."


def _checked(name: str, codes: npt.ArrayLike, low: int, high: int) -> Codes:
    """One-dimensional integer codes in [low, high) as int32; the first offender is named otherwise."""
    array = np.asarray(codes)
    if array.ndim != 1:
        raise UserError(f"{name}: expected one dimension, got shape {array.shape}.", _HINT, "invalid_codes")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{name}: expected integers, got {array.dtype}.", _HINT, "invalid_codes")
    wrong = np.flatnonzero((array < low) | (array >= high))
    if wrong.size:
        raise UserError(f"{name}: position {wrong[0]} holds {array[wrong[0]]}, outside {low}..{high - 1}.", _HINT,
                        "invalid_codes")  # fmt: skip
    return array.astype(np.int32)


def interleave(linguistic: npt.ArrayLike, semantic: npt.ArrayLike) -> Codes:
    """Linguistic (n2,) and semantic (n3,) codes to mixed ids (groups * 5,), dropping what the last group lacks.

    Raises UserError naming the first position that is out of range.
    """
    low = _checked("linguistic codes", linguistic, 0, LINGUISTIC_SIZE)
    high = _checked("semantic codes", semantic, 0, SEMANTIC_SIZE)
    groups = min(len(low) // LINGUISTIC_PER_GROUP, len(high) // SEMANTIC_PER_GROUP)
    low = low[: groups * LINGUISTIC_PER_GROUP].reshape(groups, LINGUISTIC_PER_GROUP)
    high = high[: groups * SEMANTIC_PER_GROUP].reshape(groups, SEMANTIC_PER_GROUP)
    return np.concatenate([low, high + LINGUISTIC_SIZE], axis=1, dtype=np.int32).reshape(-1)


def split(mixed: npt.ArrayLike) -> tuple[Codes, Codes]:
    """Mixed ids (groups * 5,) to linguistic (groups * 2,) and semantic (groups * 3,) codes: undoes `interleave`.

    Raises UserError naming the position and the rule it breaks.
    """
    ids = _checked("audio tokens", mixed, 0, AUDIO_VOCAB)
    if len(ids) % GROUP:
        raise UserError(f"audio tokens: {len(ids)} ids do not make whole groups of {GROUP}; the last group, from "
                        f"position {len(ids) - len(ids) % GROUP}, is cut short.", _HINT, "invalid_codes")  # fmt: skip
    is_semantic = ids >= LINGUISTIC_SIZE
    should_be_semantic = np.arange(len(ids)) % GROUP >= LINGUISTIC_PER_GROUP
    wrong = np.flatnonzero(is_semantic != should_be_semantic)
    if wrong.size:
        position = int(wrong[0])
        wanted = "a semantic id (1024..5119)" if should_be_semantic[position] else "a linguistic id (0..1023)"
        raise UserError(f"audio tokens: position {position} holds {ids[position]} where place {position % GROUP} of a "
                        f"group takes {wanted}.", _HINT, "invalid_codes")  # fmt: skip
    groups = ids.reshape(-1, GROUP)
    linguistic = groups[:, :LINGUISTIC_PER_GROUP].reshape(-1)
    semantic = groups[:, LINGUISTIC_PER_GROUP:].reshape(-1) - LINGUISTIC_SIZE
    return linguistic.copy(), semantic.astype(np.int32)


def duration_s(mixed: npt.ArrayLike) -> float:
    """Seconds of audio that mixed ids stand for, 120 ms per whole group."""
    return len(np.asarray(mixed)) // GROUP * GROUP_S


def time_align(mixed: Tensor) -> Tensor:
    """Mixed 2:3 ids (N * 5,) to pairs on the 25 Hz grid, (N * 3, 2), as the flow's embedding table numbers them.

    Column 0 holds the linguistic ids with the third place of each group padded (1024); column 1 the semantic ids,
    moved up by one to make room for that padding id. The layout is that of arXiv 2511.03601's flow decoder.
    Raises ValueError unless the length is a multiple of five.
    """
    import torch
    from torch.nn import functional

    if mixed.dim() != 1 or len(mixed) % GROUP:
        raise ValueError(f"time_align takes (N * {GROUP},) ids, got shape {tuple(mixed.shape)}")
    groups = mixed.view(-1, GROUP)  # [l l s s s] per 120 ms
    linguistic = functional.pad(groups[:, :LINGUISTIC_PER_GROUP], (0, 1), value=LINGUISTIC_PAD)
    return torch.stack([linguistic, groups[:, LINGUISTIC_PER_GROUP:] + 1], dim=-1).view(-1, 2)


def pairs_of(answers: Sequence[Codes]) -> tuple[Tensor, Tensor]:
    """Several answers time-aligned, mixed ids (n_k,) each, a last group that is not whole left out: pairs (B, T, 2) at
    25 Hz, filled up with zeros, and their lengths (B,)."""
    import torch

    rows = [time_align(torch.from_numpy(mixed[: len(mixed) // GROUP * GROUP]).long()) for mixed in answers]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])
