"""Which place of the prompt a spoken token answers to: a piece of text, and a token of the source recording.

The teachers know when they say which phoneme, so what a language model otherwise finds out over many hours, where it
is in the text, can be shown to it (`llm`). Times are seconds from the start of a reading; audio tokens stand in
groups of two linguistic (60 ms) and three semantic (40 ms). Knows nothing about models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from shared.codes import GROUP_S

SPACE = 16
PAUSE = 0


def boundaries(row: dict[str, Any]) -> np.ndarray:
    """End of every phoneme in seconds, the silence at both ends counted as one each, (phonemes + 2,)."""
    ends = np.cumsum(row["frames"]).astype(np.float64)
    scaled: np.ndarray = ends * row["duration_s"] / ends[-1]
    return scaled


def words(row: dict[str, Any]) -> np.ndarray | None:
    """First phoneme of each word of the row's text and the one behind its last, (words, 2); None where text and
    phonemes have different numbers of words."""
    ids = np.array([PAUSE, *row["phonemes"], PAUSE])
    spoken = (ids != SPACE) & (ids != PAUSE)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], spoken, [False]]).astype(int)))
    found: np.ndarray = edges.reshape(-1, 2) - 1
    return found if len(found) == len(row["text"].split()) else None


def char_starts(row: dict[str, Any]) -> np.ndarray:
    """When each character of the row's text begins, (characters,), never falling.

    By words where text and phonemes have as many, evenly within a word; else evenly over the whole.
    """
    text, ends = row["text"], boundaries(row)
    starts = np.concatenate([[0.0], ends[:-1]])
    spoken = words(row)
    result = np.zeros(len(text))
    if spoken is None:
        return np.linspace(ends[0], starts[-1], len(text), endpoint=False)
    at = 0
    for word, (first, last) in zip(text.split(), spoken + 1, strict=True):
        place = text.index(word, at)
        at = place + len(word)
        result[place:at] = np.linspace(starts[first], ends[last - 1], len(word), endpoint=False)
    return np.maximum.accumulate(result)


def token_times(count: int) -> np.ndarray:
    """The middle of every audio token of a mixed sequence, (count,) seconds."""
    group, slot = np.divmod(np.arange(count), 5)
    linguistic, semantic = (2 * group + slot + 0.5) * 0.06, (3 * group + slot - 2 + 0.5) * 0.04
    times: np.ndarray = np.where(slot < 2, linguistic, semantic)
    return times


def tokens_at(times: np.ndarray, slots: np.ndarray, count: int) -> np.ndarray:
    """The tokens of the same kind as each slot that sound at the times, of `count` tokens: (n, 3), with the kind's
    neighbour before and after; -1 where there is none."""
    is_linguistic = slots < 2
    k = np.where(is_linguistic, times / 0.06, times / 0.04).astype(int)[:, None] + np.array([-1, 0, 1])
    mixed = np.where(is_linguistic[:, None], 5 * (k // 2) + k % 2, 5 * (k // 3) + 2 + k % 3)
    found: np.ndarray = np.where((k >= 0) & (mixed < count), mixed, -1)
    return found


def source_times(times: np.ndarray, target: dict[str, Any], source: dict[str, Any]) -> np.ndarray | None:
    """When the source says what the target says at the times; None where their phonemes differ."""
    if target["phonemes"] != source["phonemes"]:
        return None
    here, there = (np.concatenate([[0.0], boundaries(row)]) for row in (target, source))
    found: np.ndarray = np.interp(times, here, there)
    return found


def speech_span(row: dict[str, Any]) -> tuple[float, float]:
    """When the first phoneme begins and the last one ends, seconds."""
    ends = boundaries(row)
    return float(ends[0]), float(ends[-2])


def put_in(pauses: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Begin and end of pauses in the recording that has them, each given as its place in the one before any was put in,
    and its length."""
    before, found = 0.0, []
    for place, length in pauses:
        found.append((place + before, place + before + length))
        before += length
    return found


def groups_outside(silences: Sequence[tuple[float, float]], groups: int) -> np.ndarray:
    """Which of the groups of a recording are not by half or more in a silence (begin and end in seconds), (groups,)."""
    outside, begins = np.ones(groups, bool), np.arange(groups) * GROUP_S
    for start, end in silences:
        outside &= np.minimum(begins + GROUP_S, end) - np.maximum(begins, start) < GROUP_S / 2
    return outside


def times_without(times: np.ndarray, at_s: float, length_s: float) -> np.ndarray:
    """Times of a recording in the one that it was before something was put in; -1 for what was put in."""
    after = times >= at_s + length_s
    found: np.ndarray = np.where(after, times - length_s, np.where(times < at_s, times, -1.0))
    return found


class TextPlaces:
    """Finds a text's characters among the tokens of a prompt.

    Args:
        pieces: the surface of every id below the audio ids.
    """

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = [_surface(piece) for piece in pieces]

    def __call__(self, ids: list[int], text: str) -> np.ndarray | None:
        """Place in `ids` of the token that holds each character of the last occurrence of the text, (characters,);
        None where the text is not spelled out."""
        surfaces = [self._pieces[i] if i < len(self._pieces) else "\0" for i in ids]
        starts = np.cumsum([0] + [len(s) for s in surfaces])
        at = "".join(surfaces).rfind(text.replace(" ", "▁"))
        if at < 0:
            return None
        places: np.ndarray = np.searchsorted(starts, np.arange(at, at + len(text)), side="right") - 1
        return places


def _surface(piece: str) -> str:
    """The character that a byte's piece stands for, as `[` outside the vocabulary does; other pieces as they are."""
    byte = re.fullmatch("<0x([0-7][0-9A-F])>", piece)
    return chr(int(byte[1], 16)) if byte else piece
