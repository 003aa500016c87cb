"""The speaker encoder: mean-free filter banks of an utterance to one vector for its voice.

The structure is that of CAM++ (arXiv 2303.00332): a small 2D network over time and frequency, dense blocks of dilated
convolutions whose outputs a context mask weighs, and pooled statistics. The published weights exist as ONNX only; this
module is what a checkpoint of one's own is trained with, in any size. Knows nothing about audio or ONNX.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class SpeakerConfig:
    """Sizes; the defaults are those of CAM++. blocks gives the layers of each dense block, dilations their spacing."""

    bins: int = 80
    embedding: int = 192
    front_channels: int = 32
    channels: int = 128
    growth: int = 32
    bottleneck: int = 128
    blocks: tuple[int, ...] = (12, 24, 16)
    dilations: tuple[int, ...] = (1, 2, 2)
    segment: int = 100

    def __post_init__(self) -> None:
        if self.bins % 8 or len(self.blocks) != len(self.dilations):
            raise ValueError(f"bins must be a multiple of 8 and every block needs one dilation: {self}")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; `stride` thins the frequency axis."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=(stride, 1), padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride=(stride, 1), bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inside, F, T) -> (B, outside, F / stride, T)."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + self.shortcut(x))


class ContextMask(nn.Module):
    """A dilated convolution whose channels are weighed by the utterance's and the segment's mean."""

    def __init__(self, config: SpeakerConfig, dilation: int) -> None:
        super().__init__()
        self.local = nn.Conv1d(config.bottleneck, config.growth, 3, padding=dilation, dilation=dilation, bias=False)
        self.squeeze = nn.Conv1d(config.bottleneck, config.bottleneck // 2, 1)
        self.excite = nn.Conv1d(config.bottleneck // 2, config.growth, 1)
        self.segment = config.segment

    def forward(self, x: Tensor) -> Tensor:
        """(B, bottleneck, T) -> (B, growth, T)."""
        context = x.mean(-1, keepdim=True) + self._segment_means(x)
        mask = torch.sigmoid(self.excite(functional.relu(self.squeeze(context))))
        out: Tensor = self.local(x) * mask
        return out

    def _segment_means(self, x: Tensor) -> Tensor:
        """The mean of each run of `segment` steps, repeated over the run: (B, C, T) -> (B, C, T)."""
        means = functional.avg_pool1d(x, self.segment, stride=self.segment, ceil_mode=True)
        repeated = means.unsqueeze(-1).expand(-1, -1, -1, self.segment).flatten(2)
        return repeated[..., : x.shape[-1]]


class DenseLayer(nn.Module):
    """Narrows to the bottleneck, looks around, and adds `growth` channels to what it got."""

    def __init__(self, channels: int, config: SpeakerConfig, dilation: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm1d(channels)
        self.narrow = nn.Conv1d(channels, config.bottleneck, 1, bias=False)
        self.bn2 = nn.BatchNorm1d(config.bottleneck)
        self.context = ContextMask(config, dilation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, T) -> (B, channels + growth, T)."""
        y = self.narrow(functional.relu(self.bn1(x)))
        return torch.cat([x, self.context(functional.relu(self.bn2(y)))], dim=1)


class Transition(nn.Module):
    """Halves the channels between dense blocks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(channels)
        self.conv = nn.Conv1d(channels, channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, T) -> (B, channels // 2, T)."""
        out: Tensor = self.conv(functional.relu(self.bn(x)))
        return out


class SpeakerEncoder(nn.Module):
    """Filter banks (B, T, bins) without their mean to speaker vectors (B, embedding); T of at least 2."""

    def __init__(self, config: SpeakerConfig) -> None:
        super().__init__()
        self.config = config
        front = config.front_channels
        self.front = nn.Sequential(
            nn.Conv2d(1, front, 3, padding=1, bias=False), nn.BatchNorm2d(front), nn.ReLU(),
            ResidualBlock(front, front, 2), ResidualBlock(front, front, 1),
            ResidualBlock(front, front, 2), ResidualBlock(front, front, 1),
            nn.Conv2d(front, front, 3, stride=(2, 1), padding=1, bias=False), nn.BatchNorm2d(front), nn.ReLU(),
        )  # fmt: skip
        channels = config.channels
        self.enter = nn.Sequential(
            nn.Conv1d(front * config.bins // 8, channels, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm1d(channels),
            nn.ReLU(),
        )
        stages: list[nn.Module] = []
        for layers, dilation in zip(config.blocks, config.dilations, strict=True):
            stages += [DenseLayer(channels + index * config.growth, config, dilation) for index in range(layers)]
            channels += layers * config.growth
            stages.append(Transition(channels))
            channels //= 2
        self.dense = nn.Sequential(*stages)
        self.leave = nn.BatchNorm1d(channels)
        self.embed = nn.Linear(2 * channels, config.embedding, bias=False)
        self.norm = nn.BatchNorm1d(config.embedding, affine=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, T, bins) -> (B, embedding)."""
        x = self.front(features.transpose(1, 2).unsqueeze(1)).flatten(1, 2)
        x = functional.relu(self.leave(self.dense(self.enter(x))))
        mean = x.mean(-1)
        deviation = ((x - mean.unsqueeze(-1)).square().mean(-1) + 1e-8).sqrt()
        out: Tensor = self.norm(self.embed(torch.cat([mean, deviation], dim=1)))
        return out
