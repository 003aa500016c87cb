"""HiFT: mel to waveform through a pitch predictor, a harmonic source and an inverse short-time Fourier transform.

Batched with lengths, so a batch of N equals N runs; the source noise comes from seeds, so a request sounds the same
alone or in a batch. Knows nothing about files or tokens. (HiFTNet: arXiv 2309.09493. Snake: arXiv 2006.08195.)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT_FRAMES = 8
F0_REACH = 5  # frames to either side that the pitch predictor sees


@dataclass(frozen=True)
class HiFTConfig:
    """Sizes of the vocoder; the defaults are those of the published checkpoint."""

    in_channels: int = 80
    base_channels: int = 512
    nb_harmonics: int = 8
    sampling_rate: int = 24000
    nsf_alpha: float = 0.1
    nsf_sigma: float = 0.003
    nsf_voiced_threshold: float = 10.0
    upsample_rates: Sequence[int] = (8, 5, 3)
    upsample_kernel_sizes: Sequence[int] = (16, 11, 7)
    istft_n_fft: int = 16
    istft_hop_len: int = 4
    resblock_kernel_sizes: Sequence[int] = (3, 7, 11)
    resblock_dilation_sizes: Sequence[Sequence[int]] = ((1, 3, 5),) * 3
    source_resblock_kernel_sizes: Sequence[int] = (7, 7, 11)
    source_resblock_dilation_sizes: Sequence[Sequence[int]] = ((1, 3, 5),) * 3
    lrelu_slope: float = 0.1
    audio_limit: float = 0.99
    f0_channels: int = 512

    @classmethod
    def from_dict(cls, section: Mapping[str, Any]) -> Self:
        """Read the `hift` section of cosyvoice.yaml; the transform's sizes may be nested in `istft_params`."""
        known = {entry.name: section[entry.name] for entry in fields(cls) if entry.name in section}
        nested = section.get("istft_params", {})
        known |= {f"istft_{name}": nested[name] for name in ("n_fft", "hop_len") if name in nested}
        if "cond_channels" in section.get("f0_predictor", {}):
            known["f0_channels"] = section["f0_predictor"]["cond_channels"]
        return cls(**known)

    @property
    def hop(self) -> int:
        """Samples per mel frame."""
        return math.prod(self.upsample_rates) * self.istft_hop_len


class SourceState(NamedTuple):
    """What the harmonic source carries from one chunk of a stream to the next, for the frames that both contain."""

    f0: Tensor  # (1, frames) in Hz
    noise: Tensor  # (1, frames*hop, harmonics)
    phase: Tensor  # (1, harmonics, 1) float64, in cycles, at the centre of the frame before them


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


class Snake(nn.Module):
    """x + sin^2(alpha x) / alpha with one alpha per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, T)."""
        alpha = self.alpha[:, None]
        return x + torch.sin(x * alpha).square() / (alpha + 1e-9)


class ResBlock(nn.Module):
    """Pairs of convolutions, the first of each pair dilated, with Snake before each."""

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel, dilation=d, padding=(kernel - 1) * d // 2) for d in dilations
        )
        self.convs2 = nn.ModuleList(nn.Conv1d(channels, channels, kernel, padding=kernel // 2) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, C, T), mask (B, 1, T) or None -> (B, C, T)."""
        layers = (self.convs1, self.convs2, self.activations1, self.activations2)
        for conv1, conv2, snake1, snake2 in zip(*layers, strict=True):
            x = x + conv2(_masked(snake2(conv1(_masked(snake1(x), mask))), mask))
        return x


class F0Predictor(nn.Module):
    """Pitch from the mel: five convolutions with ELU, a linear layer, the absolute value."""

    def __init__(self, mels: int, channels: int) -> None:
        super().__init__()
        sizes = [mels] + [channels] * 5
        # The published names count the activations between the convolutions.
        self.condnet = nn.ModuleDict({str(2 * i): nn.Conv1d(sizes[i], sizes[i + 1], 3, padding=1) for i in range(5)})
        self.classifier = nn.Linear(channels, 1)

    def forward(self, mel: Tensor, mask: Tensor | None = None) -> Tensor:
        """mel (B, 80, T), mask (B, 1, T) or None -> Hz (B, T)."""
        x = mel
        for conv in self.condnet.values():
            x = F.elu(conv(_masked(x, mask)))
        f0: Tensor = self.classifier(x.transpose(1, 2)).squeeze(-1).abs()
        return f0


class HarmonicSource(nn.Module):
    """Sines at the pitch and its overtones where voiced, noise everywhere, merged into one excitation signal."""

    def __init__(self, config: HiFTConfig) -> None:
        super().__init__()
        self.config = config
        self.l_linear = nn.Linear(config.nb_harmonics + 1, 1)

    def forward(self, f0: Tensor, noise: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The excitation (B, 1, T*hop) and the phase at the centre of every frame, (B, harmonics, T) in cycles.

        f0 (B, T) in Hz; noise (B, T*hop, harmonics); start: the phase (B, harmonics, 1) of the frame before the first.

        The phase is summed per frame in float64, then interpolated between frame centres: in lower precision the
        overtones of a long utterance drift. (The published module also draws a start phase for the overtones at the
        first sample; its own resampling to frames discards it.)
        """
        config = self.config
        harmonics = torch.arange(1, config.nb_harmonics + 2, device=f0.device)[:, None]
        phase = (f0[:, None] * harmonics / config.sampling_rate % 1).double().cumsum(-1) * config.hop  # cycles
        if start is not None:
            phase = phase + start
        cycles = F.interpolate(phase, scale_factor=config.hop, mode="linear") % 1
        voiced = (f0 > config.nsf_voiced_threshold).float().repeat_interleave(config.hop, dim=1)[..., None]
        sines = torch.sin(cycles.float() * (2 * torch.pi)).transpose(1, 2) * config.nsf_alpha
        level = voiced * config.nsf_sigma + (1 - voiced) * config.nsf_alpha / 3
        merged: Tensor = torch.tanh(self.l_linear(sines * voiced + level * noise)).transpose(1, 2)
        return merged, phase


class HiFT(nn.Module):
    """The vocoder. `noise_scale` 0 silences the source noise."""

    def __init__(self, config: HiFTConfig) -> None:
        super().__init__()
        self.config = config
        self.noise_scale = 1.0
        base, spectrum = config.base_channels, config.istft_n_fft + 2
        widths = [base // 2**i for i in range(len(config.upsample_rates) + 1)]
        self.m_source = HarmonicSource(config)
        self.f0_predictor = F0Predictor(config.in_channels, config.f0_channels)
        self.conv_pre = nn.Conv1d(config.in_channels, base, 7, padding=3)
        self.ups = nn.ModuleList(
            nn.ConvTranspose1d(widths[i], widths[i + 1], kernel, rate, padding=(kernel - rate) // 2)
            for i, (rate, kernel) in enumerate(zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True))
        )
        self.source_downs = nn.ModuleList()
        for i in range(len(config.upsample_rates)):
            rate = math.prod(config.upsample_rates[i + 1 :])
            shape = (1, 1, 0) if rate == 1 else (2 * rate, rate, rate // 2)  # kernel, stride, padding
            self.source_downs.append(nn.Conv1d(spectrum, widths[i + 1], *shape))
        self.source_resblocks = nn.ModuleList(
            ResBlock(width, kernel, dilations)
            for width, kernel, dilations in zip(
                widths[1:], config.source_resblock_kernel_sizes, config.source_resblock_dilation_sizes, strict=True
            )
        )
        self.resblocks = nn.ModuleList(
            ResBlock(width, kernel, dilations)
            for width in widths[1:]
            for kernel, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
        )
        self.conv_post = nn.Conv1d(widths[-1], spectrum, 7, padding=3)
        self.register_buffer("window", torch.hann_window(config.istft_n_fft), persistent=False)
        self.window: Tensor

    @property
    def hop(self) -> int:
        """Samples per mel frame."""
        return self.config.hop

    @property
    def context_frames(self) -> int:
        """Past frames that a stream must hand over with every chunk."""
        return CONTEXT_FRAMES

    def lower_precision(self, dtype: torch.dtype) -> Self:
        """Cast the network to `dtype` but for pitch, source and transform, whose phases need float32."""
        for part in self.children():
            if part is not self.f0_predictor and part is not self.m_source:
                part.to(dtype)
        return self

    @torch.inference_mode()
    def forward(self, mel: Tensor, lengths: Tensor | None = None, seeds: Sequence[int] | None = None) -> Tensor:
        """mel (B, 80, T) with lengths (B,) in frames or None -> waveform (B, T*hop) float32, zeros beyond a length.

        Seeds (one per member, 0 when not given) decide the source noise.
        """
        batch, _, frames = mel.shape
        uneven = None if lengths is None or bool((lengths == frames).all()) else lengths
        f0 = self.f0(mel, uneven)
        generators = [torch.Generator().manual_seed(seed) for seed in (seeds or [0] * batch)]
        noise = torch.stack([self._noise(frames, generator) for generator in generators]).to(mel.device)
        source, _ = self.m_source(f0, noise)
        wave = self._decode(mel, source, uneven)
        mask = _mask(None if uneven is None else uneven * self.hop, wave.shape[-1])
        return wave if mask is None else wave * mask[:, 0]

    @torch.inference_mode()
    def f0(self, mel: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Pitch in Hz of mel (B, 80, T), (B, T), float32, zero beyond a length."""
        mask = _mask(lengths, mel.shape[-1])
        f0: Tensor = self.f0_predictor(mel.float(), mask)
        return f0 if mask is None else f0 * mask[:, 0]

    @torch.inference_mode()
    def forward_chunk(
        self, mel: Tensor, state: SourceState | None, repeated: int, generator: torch.Generator
    ) -> tuple[Tensor, SourceState]:
        """One chunk of a stream: mel (1, 80, T), whose first frames repeat the end of the chunk before.

        `repeated` is the number of frames that the next chunk will repeat. The source is that of one pass but
        for the last F0_REACH frames, whose pitch is not yet certain. Returns (1, T*hop) and the next chunk's state.
        """
        f0, frames = self.f0(mel), mel.shape[-1]
        known = 0 if state is None else state.f0.shape[1]
        noise = self._noise(frames - known, generator)[None].to(mel.device)
        start = None
        if state is not None:
            certain = max(0, known - F0_REACH)
            f0 = torch.cat([state.f0[:, :certain], f0[:, certain:]], dim=1)
            noise, start = torch.cat([state.noise, noise], dim=1), state.phase
        source, phase = self.m_source(f0, noise, start)
        first = frames - repeated
        before = (
            phase[..., first - 1 : first] if first else (torch.zeros_like(phase[..., :1]) if start is None else start)
        )
        state = SourceState(f0[:, first:], noise[:, first * self.hop :], before % 1)
        return self._decode(mel, source, None), state

    def _noise(self, frames: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(frames * self.hop, self.config.nb_harmonics + 1, generator=generator)
        return noise * self.noise_scale

    def _decode(self, mel: Tensor, source: Tensor, lengths: Tensor | None) -> Tensor:
        config, dtype = self.config, self.conv_pre.weight.dtype
        size = mel.shape[-1]
        spectrum = self._stft(source[:, 0].float(), None if lengths is None else lengths * self.hop).to(dtype)
        x = self.conv_pre(_masked(mel.to(dtype), _mask(lengths, size, dtype)))
        kernels, rates = len(config.resblock_kernel_sizes), config.upsample_rates
        for i, up in enumerate(self.ups):
            x = up(_masked(F.leaky_relu(x, config.lrelu_slope), _mask(lengths, size, dtype)))
            size, lengths = size * rates[i], None if lengths is None else lengths * rates[i]
            if i == len(self.ups) - 1:  # the transform has one frame more than the mel's share of samples
                x, size = F.pad(x, (1, 0), mode="reflect"), size + 1
                lengths = None if lengths is None else lengths + 1
            mask = _mask(lengths, size, dtype)
            x = x + self.source_resblocks[i](self.source_downs[i](spectrum), mask)
            blocks = self.resblocks[i * kernels : (i + 1) * kernels]
            x = torch.stack([block(x, mask) for block in blocks]).mean(0)
        x = self.conv_post(_masked(F.leaky_relu(x), _mask(lengths, size, dtype))).float()
        return self._istft(x, _mask(lengths, size)).clamp(-config.audio_limit, config.audio_limit)

    def _stft(self, signal: Tensor, lengths: Tensor | None) -> Tensor:
        """Real and imaginary parts (B, n_fft+2, frames) of signal (B, L), reflected at its ends; zeros beyond."""
        n_fft, hop = self.config.istft_n_fft, self.config.istft_hop_len
        place = torch.arange(-(n_fft // 2), signal.shape[-1] + n_fft // 2, device=signal.device).abs()
        last = (torch.full((1,), signal.shape[-1], device=signal.device) if lengths is None else lengths)[:, None] - 1
        place = torch.where(place > last, 2 * last - place, place).clamp(min=0).expand(len(signal), -1)
        frames = signal.gather(1, place).unfold(1, n_fft, hop) * self.window
        spectrum = torch.fft.rfft(frames).transpose(1, 2)
        parts = torch.cat([spectrum.real, spectrum.imag], dim=1)
        return _masked(parts, None if lengths is None else _mask(lengths // hop + 1, parts.shape[-1]))

    def _istft(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Log magnitudes and phases' sines (B, n_fft+2, frames) to the waveform (B, (frames-1)*hop)."""
        n_fft, hop = self.config.istft_n_fft, self.config.istft_hop_len
        magnitude, phase = x.chunk(2, dim=1)
        spectrum = torch.polar(_masked(magnitude.exp().clamp(max=100.0), mask), torch.sin(phase))
        frames = torch.fft.irfft(spectrum, n=n_fft, dim=1) * self.window[:, None]
        weight = _masked(self.window.square()[:, None].expand(len(x), -1, x.shape[-1]), mask)
        total = (x.shape[-1] - 1) * hop + n_fft
        fold = {"output_size": (1, total), "kernel_size": (1, n_fft), "stride": (1, hop)}
        wave, envelope = F.fold(frames, **fold)[:, 0, 0], F.fold(weight.contiguous(), **fold)[:, 0, 0]
        edge = n_fft // 2
        return (wave / envelope.clamp(min=1e-11))[:, edge:-edge]


def _mask(lengths: Tensor | None, size: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """Lengths (B,) to a mask (B, 1, size), None for none."""
    if lengths is None:
        return None
    return (torch.arange(size, device=lengths.device) < lengths[:, None])[:, None].to(dtype)
