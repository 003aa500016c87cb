"""What is measured of audio tokens, and how far it is from what an edit asks for."""

from pathlib import Path

import numpy as np
import pytest
import torch

from shared.checkpoints import Checkpoint
from shared.checkpoints.decoder import load_flow
from shared.checkpoints.layout import InvalidCheckpoint
from shared.checkpoints.prosody import load_prosody
from shared.codes import interleave
from shared.models.spectral import F0Predictor, SpectralConfig
from shared.prosody import AIMS, FURTHEST, SCALES, Prosody, distances, measured

NANO = Path(__file__).parents[2] / "models" / "nano"
PLAIN = np.array([5.0, 2.0, 4.0, -6.0, 0.7])
VOCAL = [0, 1, 3]


def voice(frames: int = 100, low: float = 100.0, high: float = 200.0) -> tuple[np.ndarray, np.ndarray]:
    return np.geomspace(low, high, frames), np.ones(frames)


def test_what_is_measured_is_that_of_the_speech_without_its_ends() -> None:
    f0, power = voice()
    found = measured(f0, power)
    assert found == pytest.approx([np.log(np.sqrt(100 * 200)), np.log(12 * 0.8), np.log(100), 0.0, 1.0], abs=1e-3)
    silent = np.full(30, 1e-5)
    padded = measured(np.concatenate([np.full(30, 300.0), f0, np.zeros(30)]), np.concatenate([silent, power, silent]))
    assert padded == pytest.approx(found)
    f0[::2] = 0
    power[60:] = 0.1
    half = measured(f0, power)
    assert half[4] == pytest.approx(0.5)
    assert half[3] == pytest.approx(0.0, abs=0.01), "the louder half alone counts"


def test_what_cannot_be_measured_is_far_away() -> None:
    f0, power = voice()
    assert np.isnan(measured(f0[:3], power[:3])).all()
    unvoiced = measured(np.zeros(100), power)
    assert np.isnan(unvoiced[:2]).all()
    assert unvoiced[4] == 0
    target = PLAIN + SCALES
    near, missing = PLAIN + AIMS * SCALES, np.full(5, np.nan)
    assert distances(PLAIN, target - PLAIN, np.stack([near, missing])) == pytest.approx([0, FURTHEST])


def test_an_edit_pays_by_how_far_it_is_from_somewhat_beyond_the_teachers_change() -> None:
    target = PLAIN + 2 * SCALES
    answers = np.stack([PLAIN, target, PLAIN + 2 * AIMS * SCALES, PLAIN - 9 * SCALES])
    none, as_far, beyond, away = distances(PLAIN, target - PLAIN, answers)
    assert beyond == pytest.approx(0)
    assert as_far == pytest.approx(2 * (AIMS - 1).mean())
    assert none == pytest.approx(2 * AIMS.mean())
    assert away == FURTHEST


def test_of_a_whisper_only_duration_and_voicing_count() -> None:
    target = PLAIN.copy()
    target[4] = 0.1
    answers = np.stack([PLAIN, PLAIN])
    answers[1, 4] = 0.7 - 1.1 * 0.6
    answers[1, VOCAL] = np.nan
    spoken, whispered = distances(PLAIN, target - PLAIN, answers)
    assert whispered == pytest.approx(0, abs=1e-9)
    assert spoken > 0.5


def codes(groups: int) -> np.ndarray:
    rng = np.random.default_rng(groups)
    return interleave(rng.integers(0, 1024, groups * 2), rng.integers(0, 4096, groups * 3)).astype(np.int32)


def test_codes_are_measured_alike_alone_and_together(tiny: Path) -> None:
    torch.manual_seed(4)
    prosody = Prosody(load_flow(Checkpoint.resolve(tiny)), F0Predictor(SpectralConfig()).eval())
    answers = [codes(groups) for groups in (4, 9, 6)]
    together = prosody(answers)
    assert together.shape == (3, len(SCALES))
    for answer, found in zip(answers, together, strict=True):
        np.testing.assert_allclose(prosody([answer])[0], found, rtol=1e-3, atol=1e-3)


def test_a_checkpoint_measures_with_its_own_flow_and_vocoder(tiny: Path) -> None:
    found = load_prosody(Checkpoint.resolve(NANO))([codes(9)])
    assert found.shape == (1, len(SCALES))
    with pytest.raises(InvalidCheckpoint, match="manners"):
        load_prosody(Checkpoint.resolve(tiny))
