"""Letters are laid along their frames by the likeliest path, and tokens are owed those that follow them."""

from itertools import groupby, product

import numpy as np
import pytest

from services.trainer.core.letters import HALF_LIFE, aligned, owed
from shared.models.recognizer import frames_needed


def log_probs(frames: int, seed: int) -> np.ndarray:
    raw = np.random.default_rng(seed).normal(size=(frames, 4)) * 2
    return raw - np.log(np.exp(raw).sum(1, keepdims=True))


@pytest.mark.parametrize("letters", [[1], [1, 2], [2, 2], [3, 1, 3]])
@pytest.mark.parametrize("seed", range(4))
def test_the_path_is_the_likeliest_of_all_that_say_the_letters(letters: list[int], seed: int) -> None:
    scores = log_probs(6, seed)
    paths = [path for path in product(range(4), repeat=6) if [key for key, _ in groupby(path) if key != 0] == letters]
    best = max(paths, key=lambda path: scores[np.arange(6), path].sum())
    found = aligned(scores, letters)
    expected = np.maximum(scores[np.arange(6), best], -8.0).sum()
    assert found.scores.sum() == pytest.approx(expected)
    middles = [[frame for frame, _ in run] for key, run in groupby(enumerate(best), key=lambda one: one[1]) if key]
    assert found.frames.tolist() == [np.mean(middle) for middle in middles]


def test_blanks_count_to_the_letter_before_them_and_those_at_the_start_to_the_first() -> None:
    likely = [0, 1, 0, 0, 2, 0]
    scores = np.full((6, 3), -9.0)
    scores[np.arange(6), likely] = [-0.1, -0.2, -0.3, -0.4, -0.5, -0.6]
    found = aligned(scores, [1, 2])
    assert found.scores == pytest.approx([-1.0, -1.1])
    assert found.frames.tolist() == [1.0, 4.0]


def test_letters_alike_need_a_frame_between_them() -> None:
    assert frames_needed([1, 2, 2]) == 4
    with pytest.raises(ValueError, match="3 letters do not fit in 3 frames"):
        aligned(log_probs(3, 0), [1, 2, 2])


def test_a_token_is_owed_what_follows_it_the_nearer_the_more() -> None:
    shares = owed(np.array([1.0]), np.array([30.0]), 75)  # group 10 begins at frame 30
    assert shares[50] == pytest.approx(1.0)
    assert shares[50 - 2 * 5] == pytest.approx(0.5 ** (6 / HALF_LIFE))
    assert (np.diff(shares[2:50:5]) > 0).all(), "the semantic tokens of each group before"
    assert shares[60:].tolist() == [0.0] * 16
    both = owed(np.array([1.0, -2.0]), np.array([30.0, 30.0]), 75)
    assert both == pytest.approx(-shares)
