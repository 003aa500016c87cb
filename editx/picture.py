"""One PNG of a source and its result: log-frequency spectrograms with F0 and energy. Needs the optional matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shared.audio.io import Waveform
from shared.audio.signal import resample
from shared.errors import MissingComponent
from shared.files import write_atomically

RATE_HZ = 24_000
HOP = 240
WINDOW = 1024
F0_WINDOW = 960
F0_MIN_HZ, F0_MAX_HZ = 60.0, 500.0
VOICED_ABOVE = 0.6
TOP_HZ = 8_000.0

Samples = npt.NDArray[np.float32]


def draw(rows: Sequence[tuple[str, Waveform]], target: Path) -> None:
    """Draw titled recordings below each other on one time scale into `target`. Raises MissingComponent, UserError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingComponent(
            "The package matplotlib", "--picture needs it", "Install it with `pip install editx[picture]`."
        ) from error
    figure = Figure(figsize=(11.0, 3.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 1, squeeze=False, sharex=True)[:, 0]
    for (title, waveform), axis in zip(rows, axes, strict=True):
        _draw_one(axis, title, waveform)
    axes[-1].set_xlabel("seconds")
    axes[-1].set_xlim(0.0, max(waveform.duration_s for _, waveform in rows))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(target, buffer.getvalue())


def pitch(samples: Samples) -> npt.NDArray[np.float32]:
    """F0 in Hz per hop of 10 ms at 24 kHz, NaN where unvoiced: the peak of the normalised autocorrelation."""
    low, high = int(RATE_HZ / F0_MAX_HZ), int(RATE_HZ / F0_MIN_HZ)
    frames = _frames(samples, F0_WINDOW + high)
    heads = frames[:, :F0_WINDOW]
    size = 1 << (frames.shape[1] + F0_WINDOW - 1).bit_length()
    spectrum = np.fft.rfft(frames, size) * np.conj(np.fft.rfft(heads, size))
    products = np.fft.irfft(spectrum, size)[:, : high + 1]
    squares = np.concatenate([np.zeros((len(frames), 1)), np.cumsum(frames.astype(np.float64) ** 2, axis=1)], axis=1)
    energies = squares[:, F0_WINDOW : F0_WINDOW + high + 1] - squares[:, : high + 1]
    likeness = products / np.sqrt(energies[:, :1] * energies + 1e-9)
    best = likeness[:, low:].max(axis=1)
    lags = low + np.argmax(
        likeness[:, low:] > 0.9 * best[:, None], axis=1
    )  # the shortest period that is nearly the best
    for _ in range(low):  # climb from the flank to that period's own peak
        step = np.minimum(lags + 1, high)
        rows = np.arange(len(lags))
        lags = np.where(likeness[rows, step] > likeness[rows, lags], step, lags)
    voiced = (best > VOICED_ABOVE) & (energies[:, 0] > 1e-4 * max(float(energies[:, 0].max()), 1e-12))
    return np.where(voiced, RATE_HZ / lags, np.nan).astype(np.float32)


def energy_db(samples: Samples) -> npt.NDArray[np.float32]:
    """Level in dB of full scale per hop of 10 ms at 24 kHz."""
    power = np.mean(_frames(samples, F0_WINDOW).astype(np.float64) ** 2, axis=1)
    return np.asarray(10.0 * np.log10(power + 1e-10), np.float32)


def _draw_one(axis: Any, title: str, waveform: Waveform) -> None:
    samples = resample(torch.from_numpy(waveform.samples), waveform.sample_rate_hz, RATE_HZ).numpy()
    magnitudes = np.abs(np.fft.rfft(_frames(samples, WINDOW) * np.hanning(WINDOW), axis=1)).T
    levels = 20.0 * np.log10(magnitudes + 1e-5)
    duration_s = len(samples) / RATE_HZ
    axis.imshow(
        levels, origin="lower", aspect="auto", cmap="magma", extent=(0.0, duration_s, 0.0, RATE_HZ / 2),
        vmin=float(levels.max()) - 80.0, vmax=float(levels.max()), interpolation="nearest",
    )  # fmt: skip
    axis.set_ylim(0.0, TOP_HZ)
    axis.set_ylabel("Hz")
    axis.set_title(f"{title} ({duration_s:.2f} s)", loc="left")
    f0, level = pitch(samples), energy_db(samples)
    times = np.arange(len(f0)) * HOP / RATE_HZ
    right = axis.twinx()
    right.plot(times, f0, ".", color="deepskyblue", markersize=2.5, label="F0 (Hz)")
    right.plot(
        np.arange(len(level)) * HOP / RATE_HZ, level + 100.0, color="white", linewidth=0.8, label="energy (dB + 100)"
    )
    right.set_ylim(0.0, F0_MAX_HZ)
    right.legend(loc="upper right", fontsize=7, facecolor="0.25", labelcolor="white", framealpha=0.8)


def _frames(samples: Samples, size: int) -> npt.NDArray[np.float32]:
    """Overlapping windows of `size` samples, one per hop, the recording padded so that every hop has one."""
    padded = np.pad(samples, (0, size))
    windows: Samples = np.lib.stride_tricks.sliding_window_view(padded, size)[: len(samples) : HOP]
    return windows
