"""A vocoder that works at frame rate: harmonics and noise, each shaped by a predicted short-time spectrum.

The third kind beside HiFT and BigVGAN, for small checkpoints. From the mel it predicts F0 and voicing; an
excitation with all harmonics of that F0 and one of white noise are taken to the short-time spectrum, multiplied by
predicted filters, added and inverted. Harmonic structure and randomness are built in, so little has to be learned
and nothing runs at sample rate but two Fourier transforms. Harmonic-plus-noise after DDSP (arXiv 2001.04643),
ConvNeXt blocks after Vocos (arXiv 2306.00814). Knows nothing about checkpoints or services.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

F0_LOWEST_HZ = 50.0
F0_HIGHEST_HZ = 650.0
SILENCE = math.log(1e-5)
"""The mel's floor."""
RIGHT_CONTEXT = 48
"""Silent frames after the end: more than the receptive field, so that a row ends the same way alone and in a
longer batch."""
BLOCK_REACH = 3
"""Frames on either side of a convolution of seven."""


@dataclass(frozen=True)
class SpectralConfig:
    """Sizes of a spectral vocoder. `hop_size` is the mel's; the spectra are predicted `upsample` times as often."""

    in_channels: int = 80
    sampling_rate: int = 24_000
    hop_size: int = 480
    upsample: int = 2
    n_fft: int = 960
    hidden: int = 192
    expansion: int = 3
    blocks: int = 6
    fine_blocks: int = 3
    f0_hidden: int = 128
    f0_blocks: int = 4
    f0_bins: int = 160
    mel_fmax: float = 8000.0

    @property
    def hop(self) -> int:
        """Samples between two predicted spectra."""
        return self.hop_size // self.upsample

    @property
    def bins(self) -> int:
        return self.n_fft // 2 + 1

    @property
    def f0_reach(self) -> int:
        """Mel frames on either side that an F0 depends on."""
        return 1 + BLOCK_REACH * self.f0_blocks

    @property
    def filter_reach(self) -> int:
        """Mel frames on either side that a predicted spectrum depends on, beside what F0 depends on."""
        return BLOCK_REACH * (1 + self.blocks) + math.ceil(BLOCK_REACH * self.fine_blocks / self.upsample) + 2


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over time, then a channel mixer. (B, C, T) -> (B, C, T)."""

    def __init__(self, channels: int, expansion: int, layers: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, channels * expansion)
        self.shrink = nn.Linear(channels * expansion, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1 / layers))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).transpose(1, 2))
        out: Tensor = x + (self.gamma * self.shrink(F.gelu(self.expand(y)))).transpose(1, 2)
        return out


class F0Predictor(nn.Module):
    """F0 and voicing from the mel: a distribution over log-spaced pitches and one logit. Frame rate in, frame
    rate out."""

    pitches: Tensor

    def __init__(self, config: SpectralConfig) -> None:
        super().__init__()
        self.inlet = nn.Conv1d(config.in_channels, config.f0_hidden, 3, padding=1)
        self.blocks = nn.Sequential(
            *[ConvNeXtBlock(config.f0_hidden, 2, config.f0_blocks) for _ in range(config.f0_blocks)]
        )
        self.outlet = nn.Conv1d(config.f0_hidden, config.f0_bins + 1, 1)
        self.register_buffer(
            "pitches", torch.linspace(math.log(F0_LOWEST_HZ), math.log(F0_HIGHEST_HZ), config.f0_bins), persistent=False
        )

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 80, T) -> pitch logits (B, bins, T), voicing logits (B, T)."""
        out = self.outlet(self.blocks(F.silu(self.inlet(mel)))).float()
        return out[:, :-1], out[:, -1]

    def decode(self, mel: Tensor) -> Tensor:
        """(B, 80, T) -> F0 in Hz (B, T), 0 where unvoiced: the mean pitch within four bins of the likeliest."""
        logits, voicing = self(mel)
        best = logits.argmax(1, keepdim=True)
        near = (torch.arange(logits.shape[1], device=mel.device)[None, :, None] - best).abs() <= 4
        weights = logits.masked_fill(~near, -torch.inf).softmax(1)
        f0 = (weights * self.pitches[None, :, None]).sum(1).exp()
        return torch.where(voicing > 0, f0, 0.0)


def harmonic_excitation(f0: Tensor, hop: int, sampling_rate: int, start_phase: Tensor | None = None) -> Tensor:
    """Equal cosines at every harmonic of F0 below the Nyquist frequency. (B, T) Hz -> (B, T * hop).

    The phase is summed in float64, since float32 drifts by a cycle within minutes. Scaled to unit power; zero where F0
    is zero. `start_phase` (B,) is in cycles.
    """
    at_samples = interpolate(fill_gaps(f0), hop).double()
    cycles = torch.cumsum(at_samples / sampling_rate, dim=1)
    if start_phase is not None:
        cycles = cycles + start_phase[:, None]
    return harmonics(at_samples, cycles, sampling_rate) * interpolate((f0 > 0).float(), hop)


def harmonics(f0: Tensor, cycles: Tensor, sampling_rate: int) -> Tensor:
    """The sum of cos(k phi) over the harmonics k of F0 (B, n) in Hz at the phase `cycles` (B, n), in closed form.

    For k = 1..K it is (sin((K + 1/2) phi) / sin(phi / 2) - 1) / 2. Unit power.
    """
    phase = (cycles - cycles.floor()) * 2 * math.pi
    fitting = 0.5 * sampling_rate / f0 - 0.5
    whole = torch.floor(fitting)
    half = torch.sin(phase / 2)
    safe = torch.where(half.abs() < 1e-4, torch.full_like(half, 1e-4), half)
    total = torch.where(half.abs() < 1e-4, 2 * whole + 1, torch.sin((whole + 0.5) * phase) / safe) / 2 - 0.5
    total = total + (fitting - whole) * torch.cos((whole + 1) * phase)  # the next one fades in, or F0 would click
    return (total / torch.sqrt(fitting / 2)).float()


def fill_gaps(f0: Tensor, held: Tensor | None = None) -> Tensor:
    """F0 (B, T) with the last voiced value in unvoiced frames, so that no glide passes through zero.

    `held` (B,) is the last voiced F0 before, 0 where there was none. Before anything was voiced it is 100 Hz, and in
    the very frame before the first voiced one that one's F0.
    """
    frames = torch.arange(f0.shape[1], device=f0.device).expand_as(f0)
    last = torch.where(f0 > 0, frames, -1).cummax(1).values
    before = torch.zeros_like(f0[:, 0]) if held is None else held
    following = F.pad(f0[:, 1:], (0, 1))
    first = torch.where(before[:, None] > 0, before[:, None], torch.where(following > 0, following, 100.0))
    return torch.where(last < 0, first, torch.gather(f0, 1, last.clamp(min=0)))


def interpolate(frames: Tensor, hop: int) -> Tensor:
    """(B, T) -> (B, T * hop), linear between frame centres."""
    return F.interpolate(frames[:, None], scale_factor=hop, mode="linear", align_corners=False)[:, 0]


class SpectralVocoder(nn.Module):
    """Mel to waveform with a predicted harmonic and a predicted noise filter per frame and bin."""

    window: Tensor
    to_linear: Tensor

    def __init__(self, config: SpectralConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.f0_predictor = F0Predictor(c)
        self.inlet = nn.Conv1d(c.in_channels, c.hidden, 7, padding=3)
        self.norm = nn.LayerNorm(c.hidden, eps=1e-6)
        layers = c.blocks + c.fine_blocks
        self.blocks = nn.Sequential(*[ConvNeXtBlock(c.hidden, c.expansion, layers) for _ in range(c.blocks)])
        self.f0_inlet = nn.Conv1d(2, c.hidden, 3, padding=1)
        self.up = nn.ConvTranspose1d(c.hidden, c.hidden, 2 * c.upsample, stride=c.upsample, padding=c.upsample // 2)
        self.fine = nn.Sequential(*[ConvNeXtBlock(c.hidden, c.expansion, layers) for _ in range(c.fine_blocks)])
        self.final_norm = nn.LayerNorm(c.hidden, eps=1e-6)
        self.outlet = nn.Linear(c.hidden, 3 * c.bins)  # harmonic log magnitude, harmonic phase, noise log magnitude
        nn.init.normal_(self.outlet.weight, std=0.01)
        with torch.no_grad():
            self.outlet.bias.zero_()
            self.outlet.bias[2 * c.bins :] = -1.0
        self.register_buffer("window", torch.hann_window(c.n_fft), persistent=False)
        self.register_buffer("to_linear", _mel_to_linear(c), persistent=False)

    @classmethod
    def from_config(cls, values: dict[str, object]) -> SpectralVocoder:
        """From the `spectral` section of a cosyvoice.yaml. Raises TypeError naming an unknown key."""
        return cls(SpectralConfig(**values))  # type: ignore[arg-type]

    def filters(self, mel: Tensor, f0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 80, T), (B, T) -> harmonic log magnitude, harmonic phase, noise log magnitude, each (B, bins, T *
        upsample)."""
        c = self.config
        pitch = torch.stack([(f0 > 0).to(mel.dtype), torch.log(f0.clamp(min=F0_LOWEST_HZ)) - 5.0], 1)  # (B, 2, T)
        x = self.inlet(mel) + self.f0_inlet(pitch.to(mel.dtype))
        x = self.blocks(self.norm(x.transpose(1, 2)).transpose(1, 2))
        x = self.fine(self.up(x)[..., : mel.shape[-1] * c.upsample])
        out = self.outlet(self.final_norm(x.transpose(1, 2))).transpose(1, 2).float()
        envelope = F.interpolate(
            self.to_linear @ mel.float(), scale_factor=c.upsample, mode="linear", align_corners=False
        )
        harmonic, phase, noise = out.split(c.bins, 1)
        return (envelope + harmonic).clamp(max=4.0), phase, (envelope + noise).clamp(max=4.0)

    def synthesise(self, mel: Tensor, f0: Tensor, noise: Tensor, start_phase: Tensor | None = None) -> Tensor:
        """The waveform (B, T * hop_size) for a mel (B, 80, T), an F0 (B, T) in Hz and white noise (B, T *
        hop_size)."""
        c = self.config
        length = mel.shape[-1] * c.hop_size
        pulses = harmonic_excitation(f0.float(), c.hop_size, c.sampling_rate, start_phase)
        filters = self.filters(mel, f0)
        frames = filters[0].shape[-1]
        spectrum = shaped(self.spectra(pulses)[..., :frames], self.spectra(noise)[..., :frames], *filters)
        spectrum = F.pad(spectrum, (0, 1))
        return torch.istft(spectrum, c.n_fft, c.hop, window=self.window, length=length)

    def spectra(self, wave: Tensor, *, centred: bool = True) -> Tensor:
        """Short-time spectra (B, bins, frames) of (B, n) samples; `centred`: mirrored by half a window at both ends."""
        c = self.config
        return torch.stft(wave, c.n_fft, c.hop, window=self.window, center=centred, return_complex=True)

    def forward(self, mel: Tensor, lengths: Tensor | None = None, seed: int = 0) -> Tensor:
        """Mel to waveform.

        Args:
            mel: (B, 80, T) log mel at 50 frames a second.
            lengths: frames of each row; what lies beyond comes back as silence.
            seed: of the noise; every row gets the same one, so that a row sounds the same alone and in a batch.

        Returns:
            (B, T * 480) float32 at 24 kHz, within +-0.99.
        """
        batch, _, frames = mel.shape
        lengths = lengths if lengths is not None else torch.full((batch,), frames, device=mel.device)
        real = torch.arange(frames, device=mel.device) < lengths[:, None]
        mel = F.pad(torch.where(real[:, None], mel, SILENCE), (0, RIGHT_CONTEXT), value=SILENCE)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(mel.shape[-1] * self.config.hop_size, generator=generator).to(mel.device).expand(batch, -1)
        wave = self.synthesise(mel, self.f0_predictor.decode(mel), noise)[:, : frames * self.config.hop_size]
        return wave.clamp(-0.99, 0.99) * real.repeat_interleave(self.config.hop_size, 1)


class SpectralRows(nn.Module):
    """A spectral vocoder with a seed for every row."""

    def __init__(self, model: SpectralVocoder) -> None:
        super().__init__()
        self.model = model

    @property
    def hop(self) -> int:
        """Samples per mel frame."""
        return self.model.config.hop_size

    @torch.inference_mode()
    def forward(self, mel: Tensor, lengths: Tensor | None = None, seeds: Sequence[int] | None = None) -> Tensor:
        """mel (B, 80, T), lengths (B,) in frames, one seed per row (0 when not given) -> waveform (B, T*480)."""
        seeds = seeds or [0] * len(mel)
        waves: dict[int, Tensor] = {}
        for seed in dict.fromkeys(seeds):
            rows = [i for i, own in enumerate(seeds) if own == seed]
            made = self.model(mel[rows].float(), None if lengths is None else lengths[rows], seed=seed)
            waves |= dict(zip(rows, made, strict=True))
        return torch.stack([waves[i] for i in range(len(mel))])


def shaped(pulses: Tensor, noise: Tensor, harmonic: Tensor, phase: Tensor, aperiodic: Tensor) -> Tensor:
    """Both excitations' spectra, each times its filter (`SpectralVocoder.filters`), all (B, bins, frames)."""
    return pulses * torch.polar(harmonic.exp(), phase) + noise * aperiodic.exp()


def _mel_to_linear(config: SpectralConfig) -> Tensor:
    """A matrix (bins, 80) that reads a log magnitude at each linear bin off the log mel, by interpolation between
    band centres.

    Bands are Slaney's (linear to 1 kHz, then logarithmic, 27 bands an octave-third as published). Above the last
    band it holds its value.
    """
    edges = _slaney_edges(config.in_channels, config.mel_fmax)
    centres = edges[1:-1]
    hz = torch.linspace(0, config.sampling_rate / 2, config.bins)
    right = torch.searchsorted(centres, hz.clamp(min=float(centres[0]), max=float(centres[-1]))).clamp(
        1, len(centres) - 1
    )
    weight = ((hz - centres[right - 1]) / (centres[right] - centres[right - 1])).clamp(0, 1)
    matrix = torch.zeros(config.bins, config.in_channels)
    rows = torch.arange(config.bins)
    matrix[rows, right - 1] = 1 - weight
    matrix[rows, right] += weight
    return matrix


def _slaney_edges(bands: int, fmax: float) -> Tensor:
    """The corner frequencies in Hz of Slaney's mel bands from 0 Hz, (bands + 2,)."""
    step, knee, ratio = 200 / 3, 15.0, math.log(6.4) / 27
    top = knee + math.log(fmax / 1000) / ratio
    mels = torch.linspace(0, top, bands + 2)
    return torch.where(mels < knee, mels * step, 1000 * torch.exp(ratio * (mels - knee)))
