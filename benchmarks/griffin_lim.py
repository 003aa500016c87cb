"""Griffin-Lim from the published mel: the mark that any trained vocoder must beat. numpy only; knows nothing about
models.

The mel is inverted to linear magnitudes by non-negative updates, the phases found by fast Griffin-Lim (Perraudin et
al., 2013).
"""

from __future__ import annotations

import numpy as np
import torch

from shared.audio.features import _slaney

N_FFT, HOP, RATE_HZ = 1920, 480, 24_000


def mel_to_wave(mel: np.ndarray, rounds: int = 64, momentum: float = 0.99, seed: int = 0) -> np.ndarray:
    """Log mel (frames, 80) at 50 Hz to 24 kHz audio (frames * 480,)."""
    filters = _slaney(RATE_HZ, N_FFT, 80, 0.0, 8000.0).numpy()
    magnitude = torch.from_numpy(_invert(np.exp(mel.T), filters))
    window = torch.hann_window(N_FFT)
    generator = torch.Generator().manual_seed(seed)
    angles = torch.polar(torch.ones_like(magnitude), 2 * torch.pi * torch.rand(magnitude.shape, generator=generator))
    length, previous = magnitude.shape[1] * HOP, torch.zeros_like(angles)
    for _ in range(rounds):
        wave = torch.istft(
            torch.nn.functional.pad(magnitude * angles, (0, 1)), N_FFT, HOP, window=window, length=length
        )
        rebuilt = torch.stft(wave, N_FFT, HOP, window=window, return_complex=True)[:, : magnitude.shape[1]]
        angles = rebuilt - momentum / (1 + momentum) * previous
        angles, previous = angles / angles.abs().clamp(min=1e-9), rebuilt
    wave = torch.istft(torch.nn.functional.pad(magnitude * angles, (0, 1)), N_FFT, HOP, window=window, length=length)
    return np.asarray(wave.numpy(), np.float32)


def _invert(mel: np.ndarray, filters: np.ndarray, rounds: int = 80) -> np.ndarray:
    """Linear magnitudes (bins, frames) whose mel is the given one, by multiplicative updates."""
    linear = filters.T @ mel
    for _ in range(rounds):
        linear *= (filters.T @ mel) / np.maximum(filters.T @ (filters @ linear), 1e-9)
    return np.asarray(linear, np.float32)
