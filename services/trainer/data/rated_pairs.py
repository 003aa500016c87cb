"""The margin scorer from pairs that people rated, and the scorer as what a build asks about a pair of recordings.

Knows recordings and acoustic features; the regression itself is in `margin`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from services.trainer.data.build import Margin
from services.trainer.data.margin import Annotation, MarginScorer, Vector, read_annotations
from services.trainer.data.rows import reason
from services.trainer.evaluate.acoustic import pair_features
from services.trainer.evaluate.runner import at_16k
from shared.audio.io import Waveform, read_audio
from shared.errors import EditxError, UserError

FEWEST_HELD_BACK = 2


@dataclass(frozen=True)
class Fitted:
    """A scorer of all pairs; the mean error of one that did not see a fifth of them, None of too few; what it misses
    when it always says the mean of the others."""

    scorer: MarginScorer
    pairs: int
    error: float | None
    error_of_the_mean: float | None


def fit_margin_scorer(path: Path) -> Fitted:
    """From a file of annotations. Raises UserError naming the line, recording or lack of pairs."""
    found = read_annotations(path)
    changes = [_change(one, path) for one in found]
    scorer = MarginScorer.fit(changes, [one.category for one in found], [one.rating for one in found])
    learned, held = ([k for k in range(len(found)) if (k % 5 == 4) is back] for back in (False, True))
    if len(held) < FEWEST_HELD_BACK:
        return Fitted(scorer, len(found), None, None)
    trial = MarginScorer.fit([changes[k] for k in learned], [found[k].category for k in learned],
                             [found[k].rating for k in learned])  # fmt: skip
    guesses = [trial.score(changes[k], found[k].category) for k in held]
    mean = float(np.mean([found[k].rating for k in learned]))
    return Fitted(scorer, len(found), _error(guesses, found, held), _error([mean] * len(held), found, held))


def margin_of(scorer: MarginScorer) -> Margin:
    """The scorer as a function of two recordings and a category."""

    def margin(neutral: Waveform, expressive: Waveform, category: str) -> float:
        return scorer.score(pair_features(at_16k(neutral), at_16k(expressive)), category)

    return margin


def _change(one: Annotation, path: Path) -> Vector:
    try:
        source, audio = (at_16k(read_audio(path.parent / file)) for file in (one.source, one.audio))
        return pair_features(source, audio)
    except EditxError as error:
        raise UserError(f"{path}, pair {one.id}: {reason(error)}", "Mend the line or leave it out.", "bad_row"
                        ) from error  # fmt: skip


def _error(guesses: Sequence[float], found: Sequence[Annotation], held: Sequence[int]) -> float:
    return float(np.mean([abs(guess - found[k].rating) for guess, k in zip(guesses, held, strict=True)]))
