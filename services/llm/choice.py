"""Several answers to one request, and the one that says its text and shows its manner best.

A small language model leaves out or mumbles words in some of its draws, and in some goes half as far in the manner as
was asked, at another pace; a recogniser on audio tokens and what measures their prosody read one in a hundredth of the
time that it takes to draw. Knows nothing about prompts and engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from services.llm.requests import Outcome
from shared.codes import GROUP, Codes, pairs_of
from shared.models.recognizer import Recognizer, letters
from shared.prosody import MEASURES, Prosody, distances
from shared.schemas.request import SEED_MAX

SEED_STRIDE = 15_485_863
MANNER_COST = 1.0
"""Nats a letter that an answer pays for every step (`shared.prosody.SCALES`) that it is away from the manner."""
PACE = MEASURES.index("log_duration")
LONGEST_STRETCH = 0.35
"""The logarithm of how much faster or slower at most an answer is said than its tokens say."""


def seeds(first: int, count: int) -> list[int]:
    """The seed of each answer; the first one's is the request's own."""
    return [(first + number * SEED_STRIDE) % (SEED_MAX + 1) for number in range(count)]


@dataclass(frozen=True, eq=False)
class AskedManner:
    """An edit of the manner: mixed ids (m,) of the recording, and what the manner changes of it on average, (5,) as
    `shared.prosody.MEASURES`."""

    source: Codes
    change: npt.NDArray[np.float64]


class Chosen(NamedTuple):
    """An answer, and how much slower than its audio tokens it should be said."""

    outcome: Outcome
    stretch: float = 1.0


class Choice:
    """Which of several answers is kept.

    Args:
        recognizer: reads audio tokens.
        candidates: how many answers to draw where the recogniser can read the text.
        prosody: makes what measures audio tokens, when the first manner is asked for.
    """

    def __init__(self, recognizer: Recognizer, candidates: int, prosody: Callable[[], Prosody]) -> None:
        self._recognizer = recognizer
        self._candidates = candidates
        self._prosody = cache(prosody)

    def count(self, text: str) -> int:
        """How many answers to draw for a text; one for a text that the recogniser cannot read."""
        return self._candidates if letters(text) else 1

    @torch.inference_mode()
    def read(self, mixed: Codes) -> str:
        """What a recording's audio tokens (m,) say, as far as the recogniser can tell."""
        return self._recognizer.read(*pairs_of([mixed]))[0] if len(mixed) >= GROUP else ""

    @torch.inference_mode()
    def best(self, outcomes: Sequence[Outcome], text: str, manner: AskedManner | None = None) -> Chosen:
        """The likeliest to say the text, and near to the manner, of those that did not collapse where there are
        such; of a manner with what is still missing of its pace."""
        sound = [one for one in outcomes if one.collapse is None and len(one.mixed) >= GROUP] or list(outcomes)
        mixed, said = [one.mixed for one in sound], letters(text)
        losses = np.zeros(len(sound))
        if len(sound) > 1 and said:
            losses += self._recognizer.loss(*pairs_of(mixed), [said] * len(sound)).numpy()
        if manner is None or len(manner.source) < GROUP or min(map(len, mixed)) < GROUP:
            return Chosen(sound[int(np.argmin(losses))])
        measures = self._prosody()([manner.source, *mixed])
        best = int(np.argmin(losses + MANNER_COST * distances(measures[0], manner.change, measures[1:])))
        lacking = measures[0, PACE] + manner.change[PACE] - measures[1 + best, PACE]
        return Chosen(sound[best], float(np.exp(np.clip(lacking, -LONGEST_STRETCH, LONGEST_STRETCH))))
