"""The picture's measures and its file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from editx.asr import transcribe
from editx.picture import draw, energy_db, pitch
from shared.audio.io import Waveform
from shared.errors import MissingComponent

TIME = np.arange(24_000) / 24_000


@pytest.mark.parametrize("hz", [80.0, 140.0, 220.0, 400.0])
def test_pitch_finds_a_harmonic_tone(hz: float) -> None:
    tone = sum(np.sin(2 * np.pi * hz * k * TIME) / k for k in range(1, 8))
    found = pitch((0.2 * np.asarray(tone)).astype(np.float32))[5:-10]
    assert np.nanmedian(found) == pytest.approx(hz, rel=0.02)
    assert np.isfinite(found).mean() > 0.95


def test_noise_and_silence_have_no_pitch() -> None:
    noise = np.random.default_rng(0).normal(0.0, 0.1, 24_000).astype(np.float32)
    assert np.isfinite(pitch(noise)).mean() < 0.05
    assert not np.isfinite(pitch(np.zeros(24_000, np.float32))).any()


def test_energy_is_in_decibels_of_full_scale() -> None:
    level = energy_db(np.full(24_000, 0.1, np.float32))[:50]
    np.testing.assert_allclose(level, -20.0, atol=0.1)


def test_recordings_of_any_rate_are_drawn(tmp_path: Path) -> None:
    tone = np.sin(2 * np.pi * 150 * TIME).astype(np.float32)
    target = tmp_path / "picture.png"
    draw([("source", Waveform(tone, 16_000)), ("result", Waveform(tone, 24_000))], target)
    assert target.read_bytes().startswith(b"\x89PNG")


def test_a_missing_extra_is_named_with_the_way_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waveform = Waveform(np.ones(16_000, np.float32), 16_000)
    for module in ("matplotlib.figure", "matplotlib.backends.backend_agg", "faster_whisper"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingComponent, match=r"editx\[picture\]"):
        draw([("source", waveform)], tmp_path / "picture.png")
    with pytest.raises(MissingComponent, match=r"editx\[asr\]"):
        transcribe(waveform)
