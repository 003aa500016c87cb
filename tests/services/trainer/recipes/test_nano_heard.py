"""What Whisper hears in mels, with an encoder of random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from services.trainer.recipes.nano.heard import SILENCE, BinMap, Listener
from services.trainer.recipes.nano.whisper import WhisperEncoder
from tests.fixtures.whisper import random_whisper

BINS = 80
FRAMES = 20


@pytest.fixture(scope="module")
def encoder() -> WhisperEncoder:
    return random_whisper()


@pytest.fixture(scope="module")
def listener(encoder: WhisperEncoder) -> Listener:
    weights = torch.zeros(3 * BINS + 1, 2 * BINS)
    own = torch.eye(BINS) / np.log(10)
    weights[BINS : 2 * BINS] = torch.cat([own, own], 1)
    return Listener(encoder, BinMap(weights))


def mels(rows: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, FRAMES, BINS, generator=torch.Generator().manual_seed(seed)) - 5


def test_the_bins_are_a_linear_map_of_three_frames_found_again_by_least_squares() -> None:
    weights = torch.randn(3 * BINS + 1, 2 * BINS, generator=torch.Generator().manual_seed(1)) / 10
    known = BinMap(weights)
    readings = [mel for seed in range(20) for mel in mels(seed=seed)]
    fitted = BinMap.fit([(mel, known(mel[None])[0]) for mel in readings], ridge=1e-6)
    other = mels(2, seed=99)
    assert fitted(other).shape == (2, BINS, 2 * FRAMES)
    torch.testing.assert_close(fitted(other), known(other), atol=1e-2, rtol=1e-3)


def test_what_is_said_the_same_is_heard_the_same(listener: Listener) -> None:
    true, everywhere = mels(), torch.ones(4, FRAMES, dtype=torch.bool)
    assert float(listener.distance(true, true, everywhere)) == 0
    near = float(listener.distance(true + 0.1 * mels(seed=1), true, everywhere))
    far = float(listener.distance(mels(seed=2), true, everywhere))
    assert 0 < near < far


def test_gradients_reach_the_mel_and_no_weight(listener: Listener, encoder: WhisperEncoder) -> None:
    mel = mels(seed=1).requires_grad_()
    listener.distance(mel, mels(), torch.ones(4, FRAMES, dtype=torch.bool)).backward()
    assert mel.grad is not None
    assert bool(mel.grad.isfinite().all())
    assert float(mel.grad.abs().sum()) > 0
    assert not any(weight.requires_grad for weight in encoder._weights.values())


def test_what_lies_beyond_an_end_is_not_heard(listener: Listener) -> None:
    made, true = mels(seed=1), mels()
    real = torch.arange(FRAMES).expand(4, -1) < 12
    first = listener.distance(made, true, real)
    changed, other = made.clone(), true.clone()
    changed[:, 12:], other[:, 12:] = 3.0, SILENCE + 9
    torch.testing.assert_close(listener.distance(changed, other, real), first)
