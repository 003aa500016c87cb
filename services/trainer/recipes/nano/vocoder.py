"""Train the spectral vocoder: F0 predictor, spectral losses, then an adversary. `python -m
services.trainer.recipes.nano.vocoder`.

On a GPU the batches are larger and the adversary also folds the waveform by periods; the recipe is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.trainer.recipes.nano.discriminators import Discriminators, discriminator_loss, generator_loss
from services.trainer.recipes.nano.features import Store
from services.trainer.recipes.nano.run import (
    Run,
    begin,
    cosine,
    count_parameters,
    products,
    set_lr,
    training_options,
)
from shared.audio.features import prompt_mel
from shared.models.spectral import SpectralConfig, SpectralVocoder

HOP = 480
MEL_EDGE = 960
"""Samples of context at each side, so that no mirrored sample reaches the mel frames between: two frames."""


@dataclass(frozen=True)
class VocoderRecipe:
    """Hyper-parameters; `gpu` and `cpu` below are the two used."""

    steps: int
    batch: int
    frames: int
    lr: float = 8e-4
    final_lr: float = 1e-4
    adversary_from: int = 1500
    adversary_channels: int = 16
    periods: tuple[int, ...] = ()
    stft_weight: float = 1.0
    mel_weight: float = 2.0
    matching_weight: float = 2.0


CPU = VocoderRecipe(steps=4000, batch=8, frames=40, adversary_from=4000)
"""Without the adversary: it makes a step ten times as long there (docs/experiments.md)."""
GPU = VocoderRecipe(
    steps=12_000, batch=48, frames=64, adversary_from=2000, adversary_channels=32, periods=(2, 3, 5, 7, 11)
)


def draw(store: Store, recipe: VocoderRecipe, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A batch of segments: audio with mel context (B, frames * 480 + 1920), F0 in Hz at the mel frames (B,
    frames)."""
    length = recipe.frames * HOP + 2 * MEL_EDGE
    audio, pitch = np.zeros((recipe.batch, length), np.float32), np.zeros((recipe.batch, recipe.frames), np.float32)
    for b in range(recipe.batch):
        i = int(rng.integers(len(store)))
        whole, f0 = store.audio(i), store.array(i, "f0").astype(np.float32)
        frames = (len(whole) - 2 * MEL_EDGE) // HOP
        first = int(rng.integers(max(1, frames - recipe.frames)))
        piece = whole[first * HOP : first * HOP + length] * float(rng.uniform(0.3, 1.2))
        audio[b, : len(piece)] = np.clip(piece, -1, 1)
        # Frame i of the segment is centred 1200 samples (50 ms, F0 frame 5) after the segment's start.
        at = 5 + 2 * (first + np.arange(recipe.frames))
        pitch[b] = np.where(at < len(f0), f0[np.minimum(at, len(f0) - 1)], 0)
    return torch.from_numpy(audio), torch.from_numpy(pitch)


class SpectralLoss(nn.Module):
    """Log magnitudes and spectral convergence at several resolutions, and log mels at three. (B, n), (B, n) ->
    two scalars."""

    def __init__(self) -> None:
        super().__init__()
        for n in (256, 512, 1024, 2048):
            self.register_buffer(f"window{n}", torch.hann_window(n), persistent=False)

    def forward(self, fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        total = fake.new_zeros(())
        for n in (256, 512, 1024, 2048):
            a, b = (self._magnitude(x, n) for x in (fake, real))
            total = total + (a.log() - b.log()).abs().mean() + ((a - b).norm() / b.norm().clamp(min=1e-3))
        return total / 4, F.l1_loss(prompt_mel(fake), prompt_mel(real))

    def _magnitude(self, wave: Tensor, n: int) -> Tensor:
        window = getattr(self, f"window{n}")
        spectrum: Tensor = torch.stft(wave, n, n // 4, window=window, return_complex=True)
        return spectrum.abs().clamp(min=2e-3)


def f0_loss(model: SpectralVocoder, mel: Tensor, f0: Tensor) -> Tensor:
    """Cross entropy against a Gaussian around the true pitch, and binary cross entropy of voicing."""
    logits, voicing = model.f0_predictor(mel)
    voiced = f0 > 0
    pitches = model.f0_predictor.pitches
    distance = (torch.log(f0.clamp(min=50.0))[:, None] - pitches[None, :, None]) / (pitches[1] - pitches[0])  # type: ignore[index]
    target = torch.exp(-0.5 * (distance / 1.2) ** 2)
    target = target / target.sum(1, keepdim=True)
    entropy = -(target * logits.log_softmax(1)).sum(1)
    pitch: Tensor = (entropy * voiced).sum() / voiced.sum().clamp(min=1)
    return pitch + F.binary_cross_entropy_with_logits(voicing, voiced.float())


def main() -> None:
    arguments = training_options(__doc__).parse_args()
    device, recipe = begin(arguments, CPU, GPU)
    torch.manual_seed(1)
    model, critics, losses = (
        SpectralVocoder(SpectralConfig()).to(device),
        Discriminators(recipe.adversary_channels, periods=recipe.periods).to(device),
        SpectralLoss().to(device),
    )
    ours = torch.optim.AdamW(model.parameters(), recipe.lr, betas=(0.8, 0.99), weight_decay=0.01)
    theirs = torch.optim.AdamW(critics.parameters(), recipe.lr / 2, betas=(0.8, 0.99), weight_decay=0.01)
    parts = {"model": model, "critics": critics, "ours": ours, "theirs": theirs}
    run = Run("vocoder", parts, arguments.steps or recipe.steps, arguments.minutes)
    store = Store()
    print(
        f"vocoder: {count_parameters(model):.2f} M parameters, {store.hours:.2f} h of {len(store)} rows on {device}",
        flush=True,
    )
    while run.going:
        audio, f0 = (x.to(device) for x in draw(store, recipe, run.rng()))
        for optimizer, lr in ((ours, recipe.lr), (theirs, recipe.lr / 2)):
            set_lr(optimizer, cosine(run.step, run.steps, lr, lr * recipe.final_lr / recipe.lr))
        run.done_step(train_step(model, critics, losses, ours, theirs, audio, f0, recipe, run.step))


def train_step(
    model: SpectralVocoder,
    critics: Discriminators,
    losses: SpectralLoss,
    ours: torch.optim.Optimizer,
    theirs: torch.optim.Optimizer,
    audio: Tensor,
    f0: Tensor,
    recipe: VocoderRecipe,
    step: int,
) -> dict[str, Tensor]:
    """One step of the generator and, once it is due, one of the adversary."""
    real = audio[:, MEL_EDGE:-MEL_EDGE]
    mel = prompt_mel(audio)[:, MEL_EDGE // HOP : MEL_EDGE // HOP + recipe.frames].transpose(1, 2)
    noise, phase = torch.randn_like(real), torch.rand(len(real), device=real.device)
    with products(real.device):
        fake = model.synthesise(mel, f0, noise, phase)
    spectral, mel_distance = losses(fake, real)
    pitch = f0_loss(model, mel, f0)
    total = recipe.stft_weight * spectral + recipe.mel_weight * mel_distance + 0.3 * pitch
    report = {"stft": spectral, "mel": mel_distance, "f0": pitch}
    if step >= recipe.adversary_from:
        judged_real, judged_fake = critics(real), critics(fake.detach())
        critic = discriminator_loss(judged_real, judged_fake)
        theirs.zero_grad()
        critic.backward()
        torch.nn.utils.clip_grad_norm_(critics.parameters(), 10.0)
        theirs.step()
        adversarial, matching = generator_loss(
            [(a.detach(), [x.detach() for x in b]) for a, b in judged_real], critics(fake)
        )
        total = total + adversarial + recipe.matching_weight * matching
        report |= {"critic": critic, "adversarial": adversarial, "matching": matching}
    ours.zero_grad()
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    ours.step()
    return {key: value.detach() for key, value in report.items()}


if __name__ == "__main__":
    main()
