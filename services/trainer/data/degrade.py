"""Recordings made slower, noisier, more reverberant or less silent: the sources and targets of the simple edits.

Works on samples (n,) float32 with their rate. Every random choice comes from a generator that the caller seeds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Audio = npt.NDArray[np.float32]


def change_tempo(audio: Audio, rate_hz: int, factor: float) -> Audio:
    """Faster by `factor` at the same pitch (WSOLA, the method of SoX's tempo): (n,) -> about (n / factor,)."""
    if factor == 1:
        return audio.copy()
    window, search = int(0.04 * rate_hz) // 2 * 2, int(0.012 * rate_hz)
    hop = window // 2
    taper = np.hanning(window + 1)[:-1]
    padded = np.pad(audio.astype(np.float64), (search, window + 2 * search))
    count = max(1, int(len(audio) / factor) // hop)
    out, weight = np.zeros(count * hop + window), np.zeros(count * hop + window)
    natural = padded[search : search + window]
    for index in range(count):
        center = search + int(index * hop * factor)
        region = padded[center - search : center + search + window]
        if len(region) < window:
            break
        place = int(np.correlate(region, natural, "valid").argmax()) if index else search
        start = center - search + place
        out[index * hop : index * hop + window] += padded[start : start + window] * taper
        weight[index * hop : index * hop + window] += taper
        natural = padded[start + hop : start + hop + window]  # what would follow without a change of tempo
        if len(natural) < window:
            break
    result = out / np.maximum(weight, 1e-3)
    return result[: round(len(audio) / factor)].astype(np.float32)


def add_noise(audio: Audio, snr_db: float, rng: np.random.Generator, color: float = 1.0) -> Audio:
    """Add noise with a spectrum of 1 / f^color at a signal-to-noise ratio over the whole recording."""
    spectrum = np.fft.rfft(rng.standard_normal(len(audio)))
    spectrum[1:] /= np.arange(1, len(spectrum)) ** (color / 2)
    noise = np.fft.irfft(spectrum, len(audio))
    level = np.sqrt(np.mean(audio.astype(np.float64) ** 2) / max(float(np.mean(noise**2)), 1e-12) / 10 ** (snr_db / 10))
    return np.asarray(audio + level * noise, np.float32)


def add_reverb(audio: Audio, rate_hz: int, decay_s: float, rng: np.random.Generator, wet: float = 0.4) -> Audio:
    """A room: noise that falls by 60 dB in `decay_s`, mixed under the recording. The length stays."""
    length = int(decay_s * rate_hz)
    tail = rng.standard_normal(length) * 10 ** (-3 * np.arange(length) / length)
    tail /= np.sqrt((tail**2).sum())
    size = len(audio) + length
    room = np.fft.irfft(np.fft.rfft(audio, size) * np.fft.rfft(tail, size), size)[: len(audio)]
    mixed = (1 - wet) * audio + wet * room
    return np.asarray(mixed * (np.abs(audio).max() / max(1e-6, float(np.abs(mixed).max()))), np.float32)


def insert_pauses(audio: Audio, rate_hz: int, rng: np.random.Generator, share: float = 0.5) -> Audio:
    """Lengthen the recording by `share` with silences at quiet places, front and end included."""
    frame = int(0.02 * rate_hz)
    power = (audio[: len(audio) // frame * frame].reshape(-1, frame).astype(np.float64) ** 2).mean(1)
    quiet = np.flatnonzero(power <= np.percentile(power, 15)) * frame
    count = int(rng.integers(1, 4))
    inside = sorted(int(p) for p in rng.choice(quiet, min(count, len(quiet)), replace=False))
    places = [0, *inside, len(audio)]
    lengths = (rng.dirichlet(np.ones(len(places))) * share * len(audio)).astype(int)
    pieces, last = [], 0
    for place, length in zip(places, lengths, strict=True):
        pieces += [audio[last:place], (rng.standard_normal(length) * 1e-4).astype(np.float32)]
        last = place
    return np.concatenate([*pieces, audio[last:]])


def speech_segments(
    audio: Audio, rate_hz: int, *, below_db: float = 38.0, join_s: float = 0.12
) -> list[tuple[int, int]]:
    """Start and stop of the parts louder than `below_db` under the loudest; gaps up to `join_s` are bridged."""
    frame = int(0.02 * rate_hz)
    if len(audio) < frame:
        return [(0, len(audio))]
    power = (audio[: len(audio) // frame * frame].reshape(-1, frame).astype(np.float64) ** 2).mean(1) + 1e-12
    loud = np.flatnonzero(10 * np.log10(power) > 10 * np.log10(power.max()) - below_db)
    segments: list[tuple[int, int]] = []
    for index in loud:
        start, stop = int(index) * frame, (int(index) + 1) * frame
        if segments and start - segments[-1][1] <= join_s * rate_hz:
            segments[-1] = (segments[-1][0], stop)
        else:
            segments.append((start, stop))
    return segments


def remove_silence(audio: Audio, rate_hz: int) -> Audio:
    """The speech segments joined: the target of a vad edit, as the paper joins the segments of a voice detector."""
    return np.concatenate([audio[start:stop] for start, stop in speech_segments(audio, rate_hz)])
