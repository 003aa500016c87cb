"""Discriminators for the vocoder: spectrograms at several resolutions, and (where compute allows) the waveform
folded by periods.

After UnivNet (arXiv 2106.07889), HiFi-GAN (arXiv 2010.05646) and Vocos. Knows nothing about the generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

Judged = tuple[Tensor, list[Tensor]]


class SpectrogramDiscriminator(nn.Module):
    """Judges a short-time spectrum, real and imaginary parts compressed by the cube root of the magnitude. (B, n)
    -> logits, features."""

    def __init__(self, n_fft: int, channels: int) -> None:
        super().__init__()
        self.n_fft = n_fft
        sizes = [2, channels, channels, channels, channels]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(sizes[i], sizes[i + 1], (9, 3), stride=(2 if i else 1, 1), padding=(4, 1)))
            for i in range(4)
        )
        self.outlet = weight_norm(nn.Conv2d(channels, 1, 3, padding=1))
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def forward(self, wave: Tensor) -> Judged:
        spectrum = torch.stft(wave, self.n_fft, self.n_fft // 4, window=self.window, return_complex=True)  # type: ignore[arg-type]
        magnitude = spectrum.abs().clamp(min=1e-5)
        x = torch.view_as_real(spectrum * magnitude.pow(-2 / 3)).permute(0, 3, 1, 2)  # (B, 2, bins, frames)
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        return self.outlet(x), features


class PeriodDiscriminator(nn.Module):
    """Judges the waveform folded into rows of one period. (B, n) -> logits, features."""

    def __init__(self, period: int, channels: int) -> None:
        super().__init__()
        self.period = period
        sizes = [1, channels, channels * 2, channels * 4, channels * 4]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(sizes[i], sizes[i + 1], (5, 1), stride=(3, 1), padding=(2, 0))) for i in range(4)
        )
        self.outlet = weight_norm(nn.Conv2d(sizes[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, wave: Tensor) -> Judged:
        x = F.pad(wave, (0, -wave.shape[-1] % self.period)).view(wave.shape[0], 1, -1, self.period)
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        return self.outlet(x), features


class Discriminators(nn.Module):
    """A set of both kinds. `channels` is the width at every layer of the first kind, the first width of the
    second."""

    def __init__(
        self, channels: int, resolutions: Sequence[int] = (512, 1024, 2048), periods: Sequence[int] = ()
    ) -> None:
        super().__init__()
        members: list[nn.Module] = [SpectrogramDiscriminator(n, channels) for n in resolutions]
        members += [PeriodDiscriminator(p, channels) for p in periods]
        self.members = nn.ModuleList(members)

    def forward(self, wave: Tensor) -> list[Judged]:
        return [member(wave) for member in self.members]


def discriminator_loss(real: list[Judged], fake: list[Judged]) -> Tensor:
    """Hinge loss, mean over the members."""
    losses = [F.relu(1 - r[0]).mean() + F.relu(1 + f[0]).mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(losses).mean()


def generator_loss(real: list[Judged], fake: list[Judged]) -> tuple[Tensor, Tensor]:
    """The hinge loss of the generator and the distance of the features, means over the members."""
    adversarial = torch.stack([F.relu(1 - f[0]).mean() for f in fake]).mean()
    matching = torch.stack(
        [F.l1_loss(b, a.detach()) for r, f in zip(real, fake, strict=True) for a, b in zip(r[1], f[1], strict=True)]
    ).mean()
    return adversarial, matching
