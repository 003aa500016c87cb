"""Conditional flow matching: the way from noise to mel, its guidance and its training loss.

Knows the estimator and nothing about tokens, speakers or audio. (Flow matching: arXiv 2210.02747; guidance:
arXiv 2207.12598.)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shared.models.flow.dit import BlockCache, DiT


class Conditions(NamedTuple):
    """What the estimator is told about the mel it should make."""

    mu: Tensor  # (B, T, 80) from the tokens
    speaker: Tensor  # (B, 80)
    cond: Tensor  # (B, T, 80), the mel of the reference in its frames, zeros elsewhere

    def expected(self) -> Tensor:
        """The best guess of the mel before anything is drawn, (B, T, 80) float32: the reference's own where it is
        given, else the rough mel."""
        given = self.cond.any(-1, keepdim=True)
        return torch.where(given, self.cond, self.mu).float()

    def with_unconditional(self) -> "Conditions":
        """Twice the batch: the second half knows nothing."""
        return Conditions(*(torch.cat([part, torch.zeros_like(part)]) for part in self))

    def dropped(self, keep: Tensor) -> "Conditions":
        """Zeros for the members of the batch whose `keep` (B,) is false."""
        return Conditions(self.mu * keep[:, None, None], self.speaker * keep[:, None], self.cond * keep[:, None, None])


@dataclass(frozen=True)
class RoughGuidance:
    """Holds the way to the mel to the rough mel, for small estimators that lose words which the codes still have.

    Before time `until`, what the estimator expects at the end takes over the rough mel's course along the mel bins, as
    a Gaussian of `width` bins sees it; what is finer, and every later step, is the estimator's own. (Iterative latent
    variable refinement, arXiv 2108.02938.) Frames do not mix, so a stream gives what one pass gives.
    """

    width: float
    until: float

    def __post_init__(self) -> None:
        if self.width <= 0 or not 0 < self.until < 1:
            raise ValueError(f"rough guidance needs a width above 0 and a time between 0 and 1, not {self}")

    def correction(self, guess: Tensor, expected: Tensor) -> Tensor:
        """What to add to a guess of the mel (B, T, C), given the expected one of the same shape."""
        return (expected - guess) @ _smoothing(self.width, guess.shape[-1], guess.device)


@lru_cache(maxsize=8)
def _smoothing(width: float, bins: int, device: torch.device) -> Tensor:
    """(bins, bins) float32, by which a mel is multiplied to smooth it along its bins; the outermost bins go on beyond
    the edge."""
    offsets = torch.arange(-math.ceil(4 * width), math.ceil(4 * width) + 1)
    weights = torch.exp(-0.5 * (offsets / width) ** 2)
    places = (torch.arange(bins)[:, None] + offsets).clamp(0, bins - 1)
    rows = torch.zeros(bins, bins).scatter_add_(1, places, (weights / weights.sum()).expand(bins, -1))
    return rows.T.contiguous().to(device)


@dataclass(frozen=True)
class FlowTraining:
    """Dials of the training loss; the defaults are the published training fields, as far as they are known."""

    prompt_rate: float = 0.5  # how often the start of the mel is given as a reference
    prompt_max_share: float = 0.3  # of the utterance
    cfg_dropout: float = 0.2  # how often all conditions are dropped, for guidance
    sigma_min: float = 1e-6
    norm: str = "l1"  # or "l2"
    prior_weight: float = 0.0  # of the regression of mu to the mel


def time_grid(steps: int, device: torch.device) -> Tensor:
    """Times 0..1 of `steps` Euler steps, (steps+1,) float32, finer near 0: t = 1 - cos(pi/2 * k/steps)."""
    return 1 - torch.cos(torch.linspace(0, 1, steps + 1, device=device) * (torch.pi / 2))


def flow_noise(seed: int, frames: int, channels: int = 80) -> Tensor:
    """Start of one flow, (frames, channels) float32 on the CPU, the same on every device and in every batch.

    Drawn frame by frame, so a longer draw begins with the shorter one.
    """
    return torch.randn(frames, channels, generator=torch.Generator().manual_seed(seed))


def masked_error(predicted: Tensor, wanted: Tensor, mask: Tensor, norm: str) -> Tensor:
    """Mean l1 or l2 error over the real frames, (B, T, C) with mask (B, T) -> scalar float32."""
    difference = (predicted.float() - wanted.float()) * mask[..., None]
    error = difference.abs() if norm == "l1" else difference.square()
    return error.sum() / (mask.sum() * predicted.shape[-1]).clamp(min=1)


def _doubled(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else torch.cat([mask, mask])


class CFM(nn.Module):
    """The estimator with an Euler solver and classifier-free guidance."""

    def __init__(self, estimator: DiT, cfg_rate: float, rough: RoughGuidance | None = None) -> None:
        super().__init__()
        self.estimator = estimator
        self.cfg_rate = cfg_rate
        self.rough = rough

    def forward(
        self,
        noise: Tensor,
        conditions: Conditions,
        mask: Tensor | None,
        steps: int,
        cfg_rate: float | None = None,
        before_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """Solve from noise (B, T, 80) to a mel (B, T, 80), float32. A rate of 0 skips guidance and halves the work.

        `before_step` is called before every step; what it raises ends the work.
        """
        estimate = partial(self.estimator, mask=_doubled(mask) if self._rate(cfg_rate) > 0 else mask)

        def velocity(step: int, point: Tensor, time: Tensor, told: Conditions) -> Tensor:
            if before_step is not None:
                before_step()
            return estimate(point, time, *told)  # type: ignore[no-any-return]

        return self._solve(noise, conditions, steps, cfg_rate, velocity)

    def forward_chunk(
        self,
        noise: Tensor,
        conditions: Conditions,
        steps: int,
        cfg_rate: float | None,
        past: list[list[BlockCache]] | None,
    ) -> tuple[Tensor, list[list[BlockCache]]]:
        """As `forward` for one chunk of a stream; `past` and the second result: caches by step and block."""
        caches: list[list[BlockCache]] = []

        def velocity(step: int, point: Tensor, time: Tensor, told: Conditions) -> Tensor:
            out, cache = self.estimator.forward_chunk(point, time, *told, past[step] if past else None)
            caches.append(cache)
            return out

        return self._solve(noise, conditions, steps, cfg_rate, velocity), caches

    def _rate(self, cfg_rate: float | None) -> float:
        return self.cfg_rate if cfg_rate is None else cfg_rate

    def _solve(
        self,
        noise: Tensor,
        conditions: Conditions,
        steps: int,
        cfg_rate: float | None,
        velocity: Callable[[int, Tensor, Tensor, Conditions], Tensor],
    ) -> Tensor:
        rate = self._rate(cfg_rate)
        told = conditions.with_unconditional() if rate > 0 else conditions
        expected = None if self.rough is None else conditions.expected()
        x, times = noise.float(), time_grid(steps, noise.device)
        for step in range(steps):
            if rate > 0:
                towards, away = velocity(step, torch.cat([x, x]), times[step : step + 1], told).chunk(2)
                slope = (1 + rate) * towards - rate * away
            else:
                slope = velocity(step, x, times[step : step + 1], told)
            if self.rough is not None and expected is not None and times[step] < self.rough.until:
                left = 1 - times[step]
                slope = slope + self.rough.correction(x + left * slope, expected) / left
            x = x + (times[step + 1] - times[step]) * slope
        return x

    def loss(
        self, mel: Tensor, mask: Tensor, conditions: Conditions, dials: FlowTraining, generator: torch.Generator | None
    ) -> Tensor:
        """Error of the velocity at a random time per member of the batch; mel (B, T, 80), mask (B, T) -> scalar.

        Times are drawn with the cosine density that sampling uses. `generator` must live on the CPU.
        """
        batch = mel.shape[0]
        time = (1 - torch.cos(torch.rand(batch, generator=generator) * (torch.pi / 2))).to(mel.device)
        noise = torch.randn(mel.shape, generator=generator).to(mel)
        keep = (torch.rand(batch, generator=generator) >= dials.cfg_dropout).to(mel.device)
        shrink = 1 - dials.sigma_min
        point = (1 - shrink * time[:, None, None]) * noise + time[:, None, None] * mel
        velocity = self.estimator(point, time, *conditions.dropped(keep), mask)
        return masked_error(velocity, mel - shrink * noise, mask, dials.norm)
