"""Waveforms to waveforms: loudness limits, resampling and silence trimming as the published front end does them.

torch in, torch out, on the device of the input. Samples are float in about [-1, 1]. Knows nothing about files or
models.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

PEAK_LIMIT = 0.6
TOKEN_PEAK = 0.999
_LOBES = 6  # zero crossings of the sinc on either side
_ROLLOFF = 0.99
_MAX_KERNEL = 1 << 21  # weights of the widest polyphase filter that is worth storing

TRIM_TOP_DB = 20.0
TRIM_FRAME = 512
TRIM_HOP = 128
TRIM_GRID = 240
TRIM_KEEP_LEFT_S = 0.05
TRIM_KEEP_RIGHT_S = 0.22


def limit_peak(samples: Tensor, limit: float = PEAK_LIMIT) -> Tensor:
    """Scales (n,) samples down so that no magnitude exceeds `limit`; quieter recordings stay as they are."""
    peak = samples.abs().amax() if samples.numel() else samples.new_zeros(())
    return samples / peak * limit if peak > limit else samples


def normalize_peak(samples: Tensor, target: float = TOKEN_PEAK) -> Tensor:
    """Scales (n,) samples so that the peak is `target`; below 0.01 of full scale the gain stays at target / 0.01."""
    peak = samples.abs().amax() if samples.numel() else samples.new_zeros(())
    return samples / peak.clamp(min=0.01) * target


def through_pcm16(samples: Tensor) -> Tensor:
    """What writing samples to a 16-bit file and reading it back makes of them: full scale is 32767 out, 32768 in."""
    return (samples.clamp(-1, 1) * 32767).round() / 32768


def resample(samples: Tensor, from_hz: int, to_hz: int, *, filter_dtype: torch.dtype = torch.float32) -> Tensor:
    """Resamples (..., n) to (..., ceil(n * to_hz / from_hz)) with a Hann-windowed sinc.

    Six lobes, roll-off 0.99: the defaults of torchaudio, which the published front ends use. They compute the filter in
    float32 for the mel and the speaker and in float64 for the tokens, and quiet frames show the difference: hence
    `filter_dtype`. Filters of unusual ratios (say 47,999 to 16,000 Hz) are too large to store and are evaluated sample
    by sample. Raises ValueError for rates below 1.
    """
    if from_hz < 1 or to_hz < 1:
        raise ValueError(f"sample rates must be positive, got {from_hz} and {to_hz}")
    if from_hz == to_hz or samples.shape[-1] == 0:
        return samples
    common = math.gcd(from_hz, to_hz)
    source, target = from_hz // common, to_hz // common
    length = math.ceil(target * samples.shape[-1] / source)
    if target * (2 * _half_width(source, target) + source) > _MAX_KERNEL:
        return _resample_directly(samples, source, target, length)
    kernel = _polyphase(source, target, filter_dtype).to(samples)
    flat = samples.reshape(-1, 1, samples.shape[-1])
    half = _half_width(source, target)
    out = functional.conv1d(functional.pad(flat, (half, half + source)), kernel, stride=source)
    return out.transpose(1, 2).reshape(*samples.shape[:-1], -1)[..., :length]


def _half_width(source: int, target: int) -> int:
    """Input samples that the filter reaches to either side."""
    return math.ceil(_LOBES * source / (min(source, target) * _ROLLOFF))


def _windowed_sinc(time: Tensor, source: int, target: int) -> Tensor:
    """Filter weights at `time` in units of `source` input samples."""
    cutoff = min(source, target) * _ROLLOFF
    phase = (time * cutoff).clamp(-_LOBES, _LOBES)
    window = torch.cos(phase * math.pi / _LOBES / 2).square()
    return torch.sinc(phase) * window * cutoff / source


@lru_cache(maxsize=32)
def _polyphase(source: int, target: int, dtype: torch.dtype) -> Tensor:
    """One float32 filter per output phase, (target, 1, 2 * half + source), computed in `dtype`."""
    half = _half_width(source, target)
    taps = torch.arange(-half, half + source, dtype=dtype) / source
    phases = torch.arange(target, dtype=torch.float32)[:, None] / target  # float32 in either case, as published
    return _windowed_sinc(taps - phases, source, target)[:, None].float()


def _resample_directly(samples: Tensor, source: int, target: int, length: int, block: int = 1 << 16) -> Tensor:
    half = _half_width(source, target)
    padded = functional.pad(samples, (half, half + 1))
    reach = torch.arange(-half, half + 1, device=samples.device)
    pieces = []
    for start in range(0, length, block):
        index = torch.arange(start, min(start + block, length), device=samples.device)
        nearest = index * source // target  # whole input sample at or before the output sample
        fraction = (index * source % target).double() / target
        time = (reach - fraction[:, None]) / source
        weights = _windowed_sinc(time, source, target).to(samples)
        pieces.append((padded[..., nearest[:, None] + reach + half] * weights).sum(-1))
    return torch.cat(pieces, dim=-1)


@dataclass(frozen=True)
class TrimSpan:
    """Where speech lies: from start_s (negative where silence has to be added in front) for duration_s seconds."""

    start_s: float
    duration_s: float


def find_speech(samples: Tensor, sample_rate_hz: int) -> TrimSpan:
    """The span that the published token branch keeps of (n,) samples at 16 kHz.

    Frames of 512 samples every 128 whose RMS lies within 20 dB of the loudest count as speech (librosa's rule); the
    span reaches from 0.05 s before the first to 0.22 s after the last, its speech rounded up to blocks of 240 samples.
    """
    count = 1 + samples.shape[-1] // TRIM_HOP
    framed = functional.pad(samples, (TRIM_FRAME // 2, TRIM_FRAME // 2)).unfold(-1, TRIM_FRAME, TRIM_HOP)[:count]
    power = framed.double().square().mean(-1).clamp(min=1e-10)
    loud = torch.nonzero(10 * torch.log10(power / power.amax()) > -TRIM_TOP_DB)[:, 0]
    first = int(loud[0]) * TRIM_HOP
    end = min(samples.shape[-1], (int(loud[-1]) + 1) * TRIM_HOP)
    blocks = math.ceil((end - first) / TRIM_GRID)
    kept = int(blocks * TRIM_GRID + (TRIM_KEEP_LEFT_S + TRIM_KEEP_RIGHT_S) * sample_rate_hz)
    start = first - int(TRIM_KEEP_LEFT_S * sample_rate_hz)
    return TrimSpan(start / sample_rate_hz, kept / sample_rate_hz)


def cut(samples: Tensor, sample_rate_hz: int, span: TrimSpan) -> Tensor:
    """The span of (n,) samples at any rate, zeros where it reaches past the recording."""
    start, kept = round(span.start_s * sample_rate_hz), round(span.duration_s * sample_rate_hz)
    inside = samples[max(start, 0) : max(start + kept, 0)]
    front = min(max(-start, 0), kept)
    return functional.pad(inside, (front, kept - front - len(inside)))


def trim_silence(samples: Tensor, sample_rate_hz: int = 16000) -> Tensor:
    """Cuts (n,) samples to their speech by the published rule: see `find_speech`."""
    return cut(samples, sample_rate_hz, find_speech(samples, sample_rate_hz))
