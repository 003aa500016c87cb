"""What happens to speech between a mouth and a file: noise, rooms, narrow bands, levels. For tokenizers that must
bear real recordings.

numpy at 16 kHz, (n,) float32 in and out, drawn from a generator. Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import soxr
from scipy.signal import fftconvolve

RATE_HZ = 16_000


def colored_noise(samples: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Noise whose power falls with frequency to the `exponent` (0 white, 1 pink, 2 brown), unit level."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequency = np.fft.rfftfreq(samples, 1 / RATE_HZ)
    shaped = np.fft.irfft(spectrum * np.maximum(frequency, 30.0) ** (-exponent / 2), samples)
    return np.asarray(shaped / max(1e-9, float(np.sqrt(np.mean(shaped**2)))), np.float32)


def hum(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Mains hum with a few harmonics, unit level."""
    base = float(rng.choice([50.0, 60.0]))
    time = np.arange(samples) / RATE_HZ
    wave = sum(rng.uniform(0.1, 1) * np.sin(2 * np.pi * base * k * time + rng.uniform(0, 6.28)) for k in range(1, 6))
    return np.asarray(wave / np.sqrt(np.mean(np.square(wave))), np.float32)


def add_noise(speech: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """The sum at a signal-to-noise ratio, measured over the whole."""
    level = np.sqrt(np.mean(speech**2) + 1e-9) / 10 ** (snr_db / 20)
    return np.asarray(speech + level * noise, np.float32)


def any_noise(samples: int, rng: np.random.Generator, babble: Callable[[], np.ndarray] | None = None) -> np.ndarray:
    """One of white to brown noise, hum with hiss, or babble of other speakers, unit level."""
    kind = rng.random()
    if kind < 0.25 and babble is not None:
        voices = np.zeros(samples, np.float32)
        for _ in range(int(rng.integers(2, 5))):
            voices += np.resize(babble(), samples)
        return voices / max(1e-6, float(np.sqrt(np.mean(voices**2))))
    if kind < 0.4:
        return 0.8 * hum(samples, rng) + 0.3 * colored_noise(samples, 0.5, rng)
    return colored_noise(samples, float(rng.uniform(0, 2)), rng)


def reverberate(speech: np.ndarray, seconds: float, wet: float, rng: np.random.Generator) -> np.ndarray:
    """A room with an exponential tail that decays by 60 dB within `seconds`; the direct sound stays in place."""
    length = int(seconds * RATE_HZ)
    tail = rng.standard_normal(length) * 10 ** (-3 * np.arange(length) / length)
    tail *= wet / np.sqrt(np.sum(tail**2))
    tail[0] = 1.0
    return np.asarray(fftconvolve(speech, tail)[: len(speech)], np.float32)


def narrow(speech: np.ndarray, cutoff_hz: float) -> np.ndarray:
    """Lost high frequencies, as by a telephone or an old recording."""
    low = soxr.resample(speech, RATE_HZ, 2 * cutoff_hz)
    return np.resize(soxr.resample(low, 2 * cutoff_hz, RATE_HZ), len(speech)).astype(np.float32)


def degrade(speech: np.ndarray, rng: np.random.Generator, babble: Callable[[], np.ndarray] | None = None) -> np.ndarray:
    """One random recording situation; two in five stay clean but for the level."""
    out = speech
    if rng.random() < 0.6:
        if rng.random() < 0.4:
            out = reverberate(out, float(rng.uniform(0.1, 0.7)), float(rng.uniform(0.1, 0.8)), rng)
        if rng.random() < 0.25:
            out = narrow(out, float(rng.uniform(3400, 7800)))
        if rng.random() < 0.7:
            out = add_noise(out, any_noise(len(out), rng, babble), float(rng.uniform(3, 30)))
    peak = max(1e-4, float(np.abs(out).max()))
    return (out / peak * float(rng.uniform(0.2, 0.999))).astype(np.float32)
