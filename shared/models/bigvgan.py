"""BigVGAN v2: mel to waveform by transposed convolutions and anti-aliased periodic activations.

Two edges exist: the speech decoder's variant reflects three mel frames at either end and leaves the first convolution
unpadded; NVIDIA's published generators pad it with zeros. Knows nothing about files or tokens. (arXiv 2206.04658.)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT_FRAMES = 8
EDGE_FRAMES = 3  # half of the first convolution's seven
RATIO = 2  # of the rate at which activations run
FILTER_SIZE = 12


@dataclass(frozen=True)
class BigVGANConfig:
    """Sizes of the vocoder; the defaults are those of the speech decoder's variant."""

    num_mels: int = 80
    upsample_initial_channel: int = 512
    upsample_rates: Sequence[int] = (5, 4, 3, 2, 2, 2)
    upsample_kernel_sizes: Sequence[int] = (11, 8, 7, 4, 4, 4)
    resblock: str = "1"
    resblock_kernel_sizes: Sequence[int] = (3, 7, 11)
    resblock_dilation_sizes: Sequence[Sequence[int]] = ((1, 3, 5),) * 3
    activation: Literal["snake", "snakebeta"] = "snakebeta"
    snake_logscale: bool = True
    use_bias_at_final: bool = False
    use_tanh_at_final: bool = False
    edge: Literal["reflect", "zeros"] = "reflect"

    @classmethod
    def from_dict(cls, section: Mapping[str, Any]) -> Self:
        """Read a configuration section. Raises ValueError for an unknown kind of block, activation or edge."""
        config = cls(**{entry.name: section[entry.name] for entry in fields(cls) if entry.name in section})
        for name, choices in (
            ("resblock", "12"),
            ("activation", ("snake", "snakebeta")),
            ("edge", ("reflect", "zeros")),
        ):
            if getattr(config, name) not in choices:
                raise ValueError(f"bigvgan.{name} is {getattr(config, name)!r}; it must be one of {', '.join(choices)}")
        return config

    @classmethod
    def from_nvidia(cls, settings: Mapping[str, Any]) -> Self:
        """Read the `config.json` of a generator that NVIDIA published, whose defaults differ."""
        return cls.from_dict({"use_bias_at_final": True, "use_tanh_at_final": True, "edge": "zeros", **settings})

    @property
    def hop(self) -> int:
        """Samples per mel frame."""
        return math.prod(self.upsample_rates)


def low_pass(cutoff: float, half_width: float, size: int) -> Tensor:
    """Kaiser-windowed sinc of an even size with unit sum, (1, 1, size); cutoff and width in cycles per sample."""
    attenuation = 2.285 * (size // 2 - 1) * math.pi * 4 * half_width + 7.95
    beta = 0.0
    if attenuation > 50:
        beta = 0.1102 * (attenuation - 8.7)
    elif attenuation >= 21:
        beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    time = torch.arange(size) - (size - 1) / 2
    taps = torch.kaiser_window(size, beta=beta, periodic=False) * torch.sinc(2 * cutoff * time)
    return (taps / taps.sum()).view(1, 1, size)


class Snake(nn.Module):
    """x + sin^2(alpha x) / beta per channel; beta is alpha for `snake`, its own parameter for `snakebeta`."""

    def __init__(self, channels: int, config: BigVGANConfig) -> None:
        super().__init__()
        self.logscale = config.snake_logscale
        start = torch.zeros(channels) if self.logscale else torch.ones(channels)
        self.alpha = nn.Parameter(start)
        self.beta = nn.Parameter(start.clone()) if config.activation == "snakebeta" else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, T)."""
        alpha, beta = self.alpha[:, None], (self.alpha if self.beta is None else self.beta)[:, None]
        if self.logscale:
            alpha, beta = alpha.exp(), beta.exp()
        return x + torch.sin(x * alpha).square() / (beta + 1e-9)


class Upsample(nn.Module):
    """Doubles the rate without images: edges repeated, zeros between the samples, low pass."""

    filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", low_pass(0.5 / RATIO, 0.6 / RATIO, FILTER_SIZE))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, 2T)."""
        pad = FILTER_SIZE // RATIO - 1
        cut = pad * RATIO + (FILTER_SIZE - RATIO) // 2
        channels = x.shape[1]
        x = F.pad(x, (pad, pad), mode="replicate")
        x = F.conv_transpose1d(x, self.filter.expand(channels, -1, -1), stride=RATIO, groups=channels)
        return RATIO * x[..., cut:-cut]


class LowPass(nn.Module):
    """Low pass and every second sample, edges repeated."""

    filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", low_pass(0.5 / RATIO, 0.6 / RATIO, FILTER_SIZE))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 2T) -> (B, C, T)."""
        channels = x.shape[1]
        x = F.pad(x, (FILTER_SIZE // 2 - 1, FILTER_SIZE // 2), mode="replicate")
        return F.conv1d(x, self.filter.expand(channels, -1, -1), stride=RATIO, groups=channels)


class AntiAliased(nn.Module):
    """An activation at twice the rate, so that the overtones it makes do not fold back."""

    def __init__(self, act: Snake) -> None:
        super().__init__()
        self.act = act
        self.upsample = Upsample()
        self.downsample = nn.ModuleDict({"lowpass": LowPass()})

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, T)."""
        out: Tensor = self.downsample["lowpass"](self.act(self.upsample(x)))
        return out


def _convs(channels: int, kernel: int, dilations: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Conv1d(channels, channels, kernel, dilation=d, padding=(kernel - 1) * d // 2) for d in dilations
    )


class PairedBlock(nn.Module):
    """Resblock "1": a dilated and a plain convolution per step, an activation before each."""

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int], config: BigVGANConfig) -> None:
        super().__init__()
        self.convs1 = _convs(channels, kernel, dilations)
        self.convs2 = _convs(channels, kernel, [1] * len(dilations))
        self.activations = nn.ModuleList(AntiAliased(Snake(channels, config)) for _ in range(2 * len(dilations)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, T)."""
        layers = (self.convs1, self.convs2, self.activations[::2], self.activations[1::2])
        for conv1, conv2, act1, act2 in zip(*layers, strict=True):
            x = x + conv2(act2(conv1(act1(x))))
        return x


class SingleBlock(nn.Module):
    """Resblock "2": one dilated convolution per step, an activation before it."""

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int], config: BigVGANConfig) -> None:
        super().__init__()
        self.convs = _convs(channels, kernel, dilations)
        self.activations = nn.ModuleList(AntiAliased(Snake(channels, config)) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, T)."""
        for conv, act in zip(self.convs, self.activations, strict=True):
            x = x + conv(act(x))
        return x


class BigVGAN(nn.Module):
    """The vocoder."""

    def __init__(self, config: BigVGANConfig) -> None:
        super().__init__()
        self.config = config
        block = PairedBlock if config.resblock == "1" else SingleBlock
        widths = [config.upsample_initial_channel // 2**i for i in range(len(config.upsample_rates) + 1)]
        padding = EDGE_FRAMES if config.edge == "zeros" else 0
        self.conv_pre = nn.Conv1d(config.num_mels, widths[0], 2 * EDGE_FRAMES + 1, padding=padding)
        # One transposed convolution per stage, in a list of its own in the published names.
        self.ups = nn.ModuleList(
            nn.ModuleList([nn.ConvTranspose1d(widths[i], widths[i + 1], kernel, rate, padding=(kernel - rate) // 2)])
            for i, (rate, kernel) in enumerate(zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True))
        )
        self.resblocks = nn.ModuleList(
            block(width, kernel, dilations, config)
            for width in widths[1:]
            for kernel, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
        )
        self.activation_post = AntiAliased(Snake(widths[-1], config))
        self.conv_post = nn.Conv1d(widths[-1], 1, 7, padding=3, bias=config.use_bias_at_final)

    @property
    def hop(self) -> int:
        """Samples per mel frame."""
        return self.config.hop

    @property
    def context_frames(self) -> int:
        """Past frames that a stream must hand over with every chunk."""
        return CONTEXT_FRAMES

    def lower_precision(self, dtype: torch.dtype) -> Self:
        """Cast the network to `dtype`."""
        return self.to(dtype)

    @torch.inference_mode()
    def forward(self, mel: Tensor, lengths: Tensor | None = None, seeds: Sequence[int] | None = None) -> Tensor:
        """mel (B, num_mels, T) with lengths (B,) in frames or None -> waveform (B, T*hop) float32, zeros beyond.

        Every activation repeats its edges, so members of unequal length run one by one. Seeds have no effect: there is
        no noise in this vocoder.
        """
        if lengths is None or bool((lengths == mel.shape[-1]).all()):
            return self._generate(mel)
        waves = [self._generate(mel[i : i + 1, :, :length])[0] for i, length in enumerate(lengths.tolist())]
        return torch.stack([F.pad(wave, (0, mel.shape[-1] * self.hop - len(wave))) for wave in waves])

    def _generate(self, mel: Tensor) -> Tensor:
        config = self.config
        x = mel.to(self.conv_pre.weight.dtype)
        if config.edge == "reflect":
            x = F.pad(x, (EDGE_FRAMES, EDGE_FRAMES), mode="reflect")
        x = self.conv_pre(x)
        kernels = len(config.resblock_kernel_sizes)
        for i, stage in enumerate(self.ups):
            x = stage.get_submodule("0")(x)
            blocks = self.resblocks[i * kernels : (i + 1) * kernels]
            x = torch.stack([block(x) for block in blocks]).mean(0)
        x = self.conv_post(self.activation_post(x))[:, 0].float()
        return torch.tanh(x) if config.use_tanh_at_final else x.clamp(-1, 1)
