"""Several answers to one request, and the one that says its text best, as a checkpoint's recogniser reads it.

A small language model leaves out or mumbles words in some of its draws; a recogniser on audio tokens reads one in a
hundredth of the time that it takes to draw. Knows nothing about prompts and engines.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from services.llm.requests import Outcome
from shared.codes import GROUP, Codes, pairs_of
from shared.models.recognizer import Recognizer, letters
from shared.schemas.request import SEED_MAX

SEED_STRIDE = 15_485_863


def seeds(first: int, count: int) -> list[int]:
    """The seed of each answer; the first one's is the request's own."""
    return [(first + number * SEED_STRIDE) % (SEED_MAX + 1) for number in range(count)]


class WordChoice:
    """Which of several answers is kept.

    Args:
        recognizer: reads audio tokens.
        candidates: how many answers to draw where the recogniser can read the text.
    """

    def __init__(self, recognizer: Recognizer, candidates: int) -> None:
        self._recognizer = recognizer
        self._candidates = candidates

    def count(self, text: str) -> int:
        """How many answers to draw for a text; one for a text that the recogniser cannot read."""
        return self._candidates if letters(text) else 1

    @torch.inference_mode()
    def read(self, mixed: Codes) -> str:
        """What a recording's audio tokens (m,) say, as far as the recogniser can tell."""
        return self._recognizer.read(*pairs_of([mixed]))[0] if len(mixed) >= GROUP else ""

    @torch.inference_mode()
    def best(self, outcomes: Sequence[Outcome], text: str) -> Outcome:
        """The likeliest to say the text, of those that did not collapse where there are such."""
        sound = [one for one in outcomes if one.collapse is None and len(one.mixed) >= GROUP] or list(outcomes)
        if len(sound) == 1:
            return sound[0]
        losses = self._recognizer.loss(*pairs_of([one.mixed for one in sound]), [letters(text)] * len(sound))
        return sound[int(np.argmin(losses.numpy()))]
