"""Which letters of its text an answer says well, where it says them, and which of its tokens that is owed to.

A recogniser's letter probabilities are laid along the text by the likeliest CTC path. Beside other answers to the same
prompt this gives every letter a score above or below the usual, which is far less noisy than one number per answer.
Knows nothing about language models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shared.codes import GROUP, SEMANTIC_PER_GROUP
from shared.models.recognizer import BLANK, frames_needed

Floats = npt.NDArray[np.float64]

WORST_SCORE = -8.0
"""Of a frame: what is lower than this is as bad as this."""
FRAME_IN_GROUP = np.array([0.0, 1.5, 0.0, 1.0, 2.0])
"""Of each of a group's five tokens: two linguistic ones at 16.7 Hz, three semantic ones at 25."""
LOOKAHEAD = 3
HALF_LIFE, LONGEST = 8.0, 40
"""Frames by which a token's share in a letter halves, and beyond which it has none."""


class Alignment(NamedTuple):
    """Per letter (n,): the log probability of its frames and of the blanks behind it, and the middle of its frames."""

    scores: Floats
    frames: Floats


def aligned(log_probs: npt.NDArray[np.floating], letters: Sequence[int]) -> Alignment:
    """The likeliest CTC path of letters (n,) along log probabilities (T, classes), blank 0.

    Raises ValueError where there are fewer frames than `frames_needed`.
    """
    if len(log_probs) < frames_needed(letters) or not letters:
        raise ValueError(f"{len(letters)} letters do not fit in {len(log_probs)} frames")
    states = np.full(2 * len(letters) + 1, BLANK)
    states[1::2] = letters
    emitted = log_probs[:, states].astype(np.float64)
    may_skip = np.zeros(len(states), bool)
    may_skip[3::2] = states[3::2] != states[1:-2:2]
    best = np.full(len(states), -np.inf)
    best[:2] = emitted[0, :2]
    moves = np.zeros((len(emitted), len(states)), np.int64)
    for frame in range(1, len(emitted)):
        from_last = np.concatenate([[-np.inf], best[:-1]])
        from_before = np.where(may_skip, np.concatenate([[-np.inf, -np.inf], best[:-2]]), -np.inf)
        ways = np.stack([best, from_last, from_before])
        moves[frame] = ways.argmax(0)
        best = ways.max(0) + emitted[frame]
    path = np.zeros(len(emitted), np.int64)
    path[-1] = len(states) - (1 if best[-1] > best[-2] else 2)
    for frame in range(len(emitted) - 1, 0, -1):
        path[frame - 1] = path[frame] - moves[frame, path[frame]]
    letter = np.maximum((path - 1) // 2, 0)
    along = np.maximum(emitted[np.arange(len(path)), path], WORST_SCORE)
    said, times = path % 2 == 1, np.arange(len(path), dtype=float)
    counts = np.bincount(letter[said], minlength=len(letters))
    scores = np.bincount(letter, along, len(letters)).astype(np.float64)
    return Alignment(scores, np.bincount(letter[said], times[said], len(letters)) / counts)


def owed(above: Floats, frames: Floats, tokens: int) -> Floats:
    """What each of an answer's tokens and its end are owed, (tokens + 1,): of every letter's part above the usual (n,),
    said at `frames` (n,), half as much for every HALF_LIFE frames before it, nothing for what comes behind it."""
    place = np.arange(tokens + 1)
    time = place // GROUP * SEMANTIC_PER_GROUP + FRAME_IN_GROUP[place % GROUP]
    ahead = frames - time[:, None]
    share = np.where((ahead >= -LOOKAHEAD) & (ahead <= LONGEST), 0.5 ** (np.maximum(ahead, 0) / HALF_LIFE), 0.0)
    result: Floats = share @ above
    return result
