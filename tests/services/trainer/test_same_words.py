"""Whether two code sequences say the same, on centroids made by hand."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from services.trainer.evaluate.same_words import SameWords, code_distances, distance
from shared.codes import Codes, interleave
from shared.errors import UserError

TABLE = code_distances(np.random.default_rng(0).normal(size=(1024, 16)))


def said(linguistic: list[int]) -> Codes:
    """Mixed codes with these linguistic ones."""
    return interleave(np.array(linguistic), np.zeros(len(linguistic) // 2 * 3, np.int64))


def test_a_code_is_at_no_distance_from_itself_and_distances_are_mutual() -> None:
    assert np.abs(np.diag(TABLE)).max() < 1e-9
    assert np.allclose(TABLE, TABLE.T)
    assert TABLE.min() > -1e-9
    assert TABLE.max() <= 2


def test_the_same_words_said_slower_are_at_no_distance() -> None:
    assert distance(said([5, 6, 7, 8]), said([5, 5, 6, 6, 7, 7, 8, 8]), TABLE) == pytest.approx(0.0, abs=1e-9)


def test_the_distance_is_the_mean_along_the_best_alignment() -> None:
    assert distance(said([5, 6]), said([5, 9]), TABLE) == pytest.approx(TABLE[6, 9] / 2)
    there, back = (said([1, 2, 3, 4]), said([4, 3, 2, 1])), (said([4, 3, 2, 1]), said([1, 2, 3, 4]))
    assert distance(*there, TABLE) == pytest.approx(distance(*back, TABLE))


def test_readings_of_the_same_words_rate_ten_and_of_others_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    texts = [rng.integers(1024, size=20).tolist() for _ in range(8)]
    same = [(said(text), said([code for code in text for _ in (0, 1)])) for text in texts]
    other = [(said(a), said(b)) for a, b in pairwise(texts)]
    scale = SameWords.fit(TABLE, same, other)
    assert scale.rating(*same[0]) == 10.0
    assert np.median([scale.rating(*pair) for pair in other]) < 1.5
    half = said(texts[0][:10] + texts[1][10:])
    assert 1.5 < scale.rating(half, said(texts[0])) < 9.5
    scale.save(tmp_path / "words.json")
    again = SameWords.load(tmp_path / "words.json", TABLE)
    assert again.rating(half, said(texts[0])) == scale.rating(half, said(texts[0]))


def test_what_cannot_be_told_apart_is_refused() -> None:
    pair = (said([1, 2]), said([3, 4]))
    with pytest.raises(UserError, match="no more alike"):
        SameWords.fit(TABLE, [pair], [pair])
    with pytest.raises(UserError, match="both needed"):
        SameWords.fit(TABLE, [], [pair])
    with pytest.raises(UserError, match="empty"):
        distance(said([]), said([1, 2]), TABLE)
