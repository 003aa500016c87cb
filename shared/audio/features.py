"""Waveforms to the features that the models were trained on: three mel families and the linguistic branch's stacking.

torch in, torch out, on the device of the input. Every feature takes (n,) samples or a padded batch (B, n) with lengths,
and gives each row of a batch what the row gives alone. Knows nothing about models or files.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

FRAME_400 = 400  # 25 ms at 16 kHz
HOP_160 = 160  # 10 ms at 16 kHz
LFR_STACK = 7
LFR_STRIDE = 6
STREAM_CHUNK = 3840  # samples that a step of the published chunk loop takes: 240 ms at 16 kHz
STREAM_TAIL = 880  # a last step with fewer samples gives no frame
_EPSILON = 1.1920928955078125e-07  # float32's, kaldi's floor below the logarithm


@dataclass(frozen=True)
class MelConfig:
    """Sizes of the prompt mel, as `mel_conf` of cosyvoice.yaml names them; the defaults are the published values."""

    num_mels: int = 80
    n_fft: int = 1920
    hop_size: int = 480
    win_size: int = 1920
    sampling_rate: int = 24000
    fmin: float = 0.0
    fmax: float = 8000.0

    def __post_init__(self) -> None:
        if min(self.num_mels, self.hop_size, self.win_size) < 1 or not self.hop_size <= self.win_size <= self.n_fft:
            raise ValueError(f"num_mels, hop_size, win_size and n_fft must be positive and grow in this order: {self}")
        if not 0 <= self.fmin < self.fmax <= self.sampling_rate / 2:
            raise ValueError(f"fmin and fmax must lie in 0..{self.sampling_rate / 2:g}: {self}")


def prompt_mel(samples: Tensor, lengths: Tensor | None = None, config: MelConfig | None = None) -> Tensor:
    """Log mel of the reference at 50 frames/s: 24 kHz samples (n,) or (B, n) -> (frames, 80) or (B, frames, 80).

    Slaney filters below 8 kHz, 720 samples mirrored at both ends, log of at least 1e-5. Frames past a row's end are 0.
    Rows need 721 samples: ValueError otherwise.
    """
    config = config or MelConfig()
    batch, lengths = _as_batch(samples, lengths)
    side = (config.n_fft - config.hop_size) // 2
    frames = _reflected(batch, lengths, side).unfold(-1, config.n_fft, config.hop_size)
    window = _window("hann", config.win_size).to(batch)
    spectrum = torch.fft.rfft(frames * functional.pad(window, (0, config.n_fft - config.win_size)))
    magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
    filters = _slaney(config.sampling_rate, config.n_fft, config.num_mels, config.fmin, config.fmax).to(batch)
    mel = (magnitude @ filters.T).clamp(min=1e-5).log()
    return _like(samples, _cleared(mel, (lengths + 2 * side - config.n_fft) // config.hop_size + 1))


def whisper_log_mel(samples: Tensor, lengths: Tensor | None = None, bins: int = 128) -> Tensor:
    """Whisper's log mel of 16 kHz samples: (n,) or (B, n) -> (bins, n // 160) or (B, bins, max // 160).

    Floored 8 (in log10) below the loudest value of its own row. Frames past a row's end are 0. Rows need 201 samples:
    ValueError otherwise.
    """
    batch, lengths = _as_batch(samples, lengths)
    frames = _reflected(batch, lengths, FRAME_400 // 2).unfold(-1, FRAME_400, HOP_160)[:, : batch.shape[1] // HOP_160]
    spectrum = torch.fft.rfft(frames * _window("hann", FRAME_400).to(batch))
    power = spectrum.real.square() + spectrum.imag.square()
    log = (power @ _slaney(16000, FRAME_400, bins, 0.0, 8000.0).to(batch).T).clamp(min=1e-10).log10()
    counts = lengths // HOP_160
    inside = torch.arange(log.shape[1], device=log.device) < counts[:, None]
    loudest = log.masked_fill(~inside.unsqueeze(-1), -math.inf).amax(dim=(1, 2), keepdim=True)
    mel = (torch.maximum(log, loudest - 8.0) + 4.0) / 4.0
    return _like(samples, _cleared(mel, counts).transpose(1, 2))


def speaker_fbank(samples: Tensor, lengths: Tensor | None = None) -> Tensor:
    """CAM++ input of 16 kHz samples: kaldi filter bank with the utterance's mean removed, (n,) -> (frames, 80).

    A batch (B, n) gives (B, frames, 80) with zeros past each row's end. Shorter than 400 samples gives no frame.
    """
    batch, lengths = _as_batch(samples, lengths)
    bank = kaldi_fbank(batch, "povey")
    counts = fbank_frames(lengths)
    bank = _cleared(bank, counts)
    mean = bank.sum(dim=1, keepdim=True) / counts.clamp(min=1)[:, None, None]
    return _like(samples, _cleared(bank - mean, counts))


def linguistic_features(samples: Tensor, lengths: Tensor | None = None, cmvn: Tensor | None = None) -> Tensor:
    """Features of the linguistic branch: 16 kHz samples (n,) or (B, n) -> (frames, 560) or (B, frames, 560).

    Hamming filter bank of 16-bit scaled samples, seven 10 ms frames stacked every six, then cmvn (2, 560) added (row 0)
    and multiplied (row 1). The counts are those of the published chunk loop (`linguistic_frames`); frames past are 0.
    """
    batch, lengths = _as_batch(samples, lengths)
    bank = kaldi_fbank(batch * 32768, "hamming")
    counts = linguistic_frames(lengths)
    stacked = _stack(bank, fbank_frames(lengths), int(counts.max()) if len(counts) else 0)
    if cmvn is not None:
        stacked = (stacked + cmvn[0].to(stacked)) * cmvn[1].to(stacked)
    return _like(samples, _cleared(stacked, counts))


def fbank_frames(lengths: Tensor) -> Tensor:
    """10 ms frames that fit wholly into so many 16 kHz samples."""
    return ((lengths - FRAME_400) // HOP_160 + 1).clamp(min=0)


def linguistic_frames(lengths: Tensor) -> Tensor:
    """60 ms frames that the published chunk loop makes of so many 16 kHz samples.

    The loop takes 240 ms a step, four frames each; of a last, shorter step it drops what is below 55 ms.
    """
    whole, tail = lengths // STREAM_CHUNK, lengths % STREAM_CHUNK
    up_to_the_end = (fbank_frames(lengths) + LFR_STRIDE - 1) // LFR_STRIDE
    return torch.where(tail < STREAM_TAIL, whole * (STREAM_CHUNK // (HOP_160 * LFR_STRIDE)), up_to_the_end)


def kaldi_fbank(samples: Tensor, window: Literal["hamming", "povey"], bins: int = 80) -> Tensor:
    """Kaldi's log mel filter bank without dither: 16 kHz (B, n) -> (B, (n - 400) // 160 + 1, bins).

    25 ms every 10 ms, mean removed per frame, pre-emphasis 0.97, 512-point power spectrum, 20 Hz to 8 kHz.
    """
    if samples.shape[-1] < FRAME_400:
        return samples.new_zeros(samples.shape[0], 0, bins)
    frames: Tensor = samples.unfold(-1, FRAME_400, HOP_160)
    frames = frames - frames.mean(-1, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    frames = (frames - 0.97 * previous) * _window(window, FRAME_400).to(samples)
    spectrum = torch.fft.rfft(frames, n=512)
    power = spectrum.real.square() + spectrum.imag.square()
    energies: Tensor = power @ _kaldi_filters(bins).to(samples).T
    return energies.clamp(min=_EPSILON).log()


def _stack(bank: Tensor, counts: Tensor, out_frames: int) -> Tensor:
    """Seven frames side by side every six, (B, t, bins) -> (B, out_frames, 7 * bins); ends are repeated outwards."""
    index = torch.arange(out_frames, device=bank.device)[:, None] * LFR_STRIDE
    index = index + torch.arange(LFR_STACK, device=bank.device) - LFR_STACK // 2
    index = torch.minimum(index.clamp(min=0), (counts - 1).clamp(min=0)[:, None, None])  # (B, out, 7)
    if bank.shape[1] == 0 or out_frames == 0:
        return bank.new_zeros(bank.shape[0], out_frames, LFR_STACK * bank.shape[2])
    rows = torch.arange(bank.shape[0], device=bank.device)[:, None, None]
    return bank[rows, index].flatten(2)


def _as_batch(samples: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    batch = samples if samples.dim() == 2 else samples[None]
    if lengths is None:
        lengths = torch.full((batch.shape[0],), batch.shape[1], device=batch.device)
    return batch, lengths.to(batch.device)


def _like(samples: Tensor, features: Tensor) -> Tensor:
    return features if samples.dim() == 2 else features[0]


def _cleared(features: Tensor, counts: Tensor) -> Tensor:
    """Zeros in (B, frames, bins) past each row's count."""
    inside = torch.arange(features.shape[1], device=features.device) < counts[:, None]
    return torch.where(inside.unsqueeze(-1), features, 0.0)


def _reflected(batch: Tensor, lengths: Tensor, side: int) -> Tensor:
    """(B, n) with `side` samples mirrored before the start and after each row's own end: (B, n + 2 * side).

    Raises ValueError where a row is not longer than `side`.
    """
    if len(lengths) and int(lengths.min()) <= side:
        raise ValueError(f"{int(lengths.min())} samples are too few to mirror {side} at the ends")
    index = torch.arange(-side, batch.shape[1] + side, device=batch.device).abs()
    last = lengths[:, None] - 1
    mirrored = torch.where(index > last, 2 * last - index, index).clamp(min=0)
    return batch.gather(1, mirrored)


@lru_cache(maxsize=16)
def _window(name: Literal["hann", "hamming", "povey"], size: int) -> Tensor:
    if name == "hann":
        return torch.hann_window(size)
    if name == "hamming":
        return torch.hamming_window(size, periodic=False)
    return torch.hann_window(size, periodic=False).pow(0.85)


def _triangles(edges: Tensor, at: Tensor) -> Tensor:
    """Triangular filters (bins, points) with corners at bins + 2 edges, read at the given points."""
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return torch.minimum((at - low) / (centre - low), (high - at) / (high - centre)).clamp(min=0)


@lru_cache(maxsize=8)
def _kaldi_filters(bins: int) -> Tensor:
    """Triangles on the mel axis 1127 ln(1 + f / 700) from 20 to 8000 Hz, (bins, 257); the last point counts nothing."""
    ends = _kaldi_mel(torch.tensor([20.0, 8000.0], dtype=torch.float64))
    edges = torch.linspace(float(ends[0]), float(ends[1]), bins + 2, dtype=torch.float64)
    points = torch.arange(256, dtype=torch.float64) * 16000 / 512
    return functional.pad(_triangles(edges, _kaldi_mel(points)), (0, 1)).float()


def _kaldi_mel(hz: Tensor) -> Tensor:
    return 1127 * torch.log1p(hz / 700)


@lru_cache(maxsize=16)
def _slaney(sample_rate_hz: int, n_fft: int, bins: int, fmin: float, fmax: float) -> Tensor:
    """Slaney's mel filters of unit area on the frequency axis, (bins, n_fft // 2 + 1): librosa's default."""
    hz = _mel_to_hz(torch.linspace(_hz_to_mel(fmin), _hz_to_mel(fmax), bins + 2, dtype=torch.float64))
    points = torch.linspace(0, sample_rate_hz / 2, n_fft // 2 + 1, dtype=torch.float64)
    return (_triangles(hz, points) * (2 / (hz[2:] - hz[:-2]))[:, None]).float()


_LINEAR_HZ = 200 / 3  # per mel below 1 kHz
_LOG_STEP = math.log(6.4) / 27  # per mel above


def _hz_to_mel(hz: float) -> float:
    return hz / _LINEAR_HZ if hz < 1000 else 15 + math.log(hz / 1000) / _LOG_STEP


def _mel_to_hz(mel: Tensor) -> Tensor:
    return torch.where(mel < 15, mel * _LINEAR_HZ, 1000 * torch.exp((mel - 15) * _LOG_STEP))
