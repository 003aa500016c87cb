"""Train the linguistic tokenizer: a small SAN-M encoder taught by Whisper and by the teacher's phonemes, then 1024
centroids.

The encoder hears degraded audio and must give what Whisper gives for the clean one, and name the phoneme. After two
thirds of the steps the centroids are found by k-means, and from then on both heads read the nearest centroid
instead of the hidden state (straight through), so that what the code keeps is what the heads need. `python -m
services.trainer.recipes.nano.linguistic`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.trainer.recipes.nano import augment
from services.trainer.recipes.nano.features import Store
from services.trainer.recipes.nano.quantizer import Codebook
from services.trainer.recipes.nano.run import (
    Optimizer,
    Run,
    begin,
    cosine,
    count_parameters,
    products,
    set_lr,
    training_options,
)
from services.trainer.recipes.nano.teacher import PHONEME_FRAME_S
from shared.audio.features import linguistic_features
from shared.models.linguistic import LinguisticConfig, LinguisticEncoder

CONFIG = LinguisticConfig(output_size=192, attention_heads=4, linear_units=768, num_blocks=6, dropout_rate=0.0)
FRAME_S = 0.06
PHONEMES = 178
CENTROIDS = 1024


@dataclass(frozen=True)
class LinguisticRecipe:
    steps: int
    batch: int
    seconds: float = 3.6
    lr: float = 1.5e-3
    final_lr: float = 1e-4
    quantize_from: float = 0.6
    """Share of the steps after which the heads read centroids."""


CPU = LinguisticRecipe(steps=5000, batch=12)
GPU = LinguisticRecipe(steps=8000, batch=96)


class Student(nn.Module):
    """The encoder, its codebook and the two heads that are thrown away after training."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder = LinguisticEncoder(CONFIG)
        self.codebook = Codebook(CENTROIDS, CONFIG.output_size)
        self.to_teacher = nn.Sequential(
            nn.Conv1d(CONFIG.output_size, 512, 3, padding=1), nn.GELU(), nn.Conv1d(512, 512, 1)
        )
        self.to_phoneme = nn.Linear(CONFIG.output_size, PHONEMES)
        self.register_buffer("shift", torch.zeros(CONFIG.input_size))
        self.register_buffer("scale", torch.ones(CONFIG.input_size))

    def features(self, audio: Tensor) -> Tensor:
        """16 kHz (B, n) to normalised features (B, T, 560)."""
        return (linguistic_features(audio) + self.shift) * self.scale

    def forward(self, audio: Tensor, target: Tensor, phonemes: Tensor, quantized: bool) -> dict[str, Tensor]:
        """Audio (B, n) at 16 kHz, teacher (B, T, 512), phonemes (B, T) with -100 where unknown -> losses and
        accuracy."""
        with torch.no_grad():
            features = self.features(audio)
        frames = min(features.shape[1], target.shape[1])
        hidden = self.encoder(features)[:, :frames].float()
        commitment = hidden.new_zeros(())
        if quantized:
            hidden, _, commitment = self.codebook(hidden)
        guess = self.to_teacher(hidden.transpose(1, 2)).transpose(1, 2)
        target, phonemes = target[:, :frames], phonemes[:, :frames]
        regression = F.mse_loss(guess, target) + (1 - F.cosine_similarity(guess, target, dim=-1)).mean()
        logits = self.to_phoneme(hidden)
        entropy = F.cross_entropy(logits.flatten(0, 1), phonemes.flatten(), ignore_index=-100)
        known = phonemes >= 0
        accuracy = ((logits.argmax(-1) == phonemes) & known).sum() / known.sum().clamp(min=1)
        return {"teacher": regression, "phoneme": entropy, "accuracy": accuracy, "commitment": commitment}


class Batches:
    """Random excerpts of the corpus, degraded, with their targets. The teacher's states are normalised per
    dimension."""

    def __init__(self, store: Store, recipe: LinguisticRecipe) -> None:
        self.store, self.recipe = store, recipe
        self._resampled: dict[int, np.ndarray] = {}
        sample = np.concatenate(
            [store.array(i, "last") for i in range(0, len(store), max(1, len(store) // 200))]
        ).astype(np.float32)
        self.mean, self.std = sample.mean(0), sample.std(0) + 1e-4

    def clean(self, i: int) -> np.ndarray:
        """16 kHz audio of row i, resampled once."""
        if i not in self._resampled:
            self._resampled[i] = (soxr.resample(self.store.audio(i), 24_000, 16_000) * 32767).astype(np.int16)
        return self._resampled[i].astype(np.float32) / 32767

    def draw(self, rng: np.random.Generator, clean: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        frames = round(self.recipe.seconds / FRAME_S)
        samples = round(self.recipe.seconds * 16_000)
        audio = np.zeros((self.recipe.batch, samples), np.float32)
        target = np.zeros((self.recipe.batch, frames, 512), np.float32)
        labels = np.full((self.recipe.batch, frames), -100)
        for b in range(self.recipe.batch):
            i = int(rng.integers(len(self.store)))
            whole, states = self.clean(i), self.store.array(i, "last")
            first = int(rng.integers(max(1, len(states) - frames)))
            piece = whole[round(first * FRAME_S * 16_000) :][:samples]
            audio[b, : len(piece)] = (
                piece if clean else augment.degrade(piece, rng, lambda: self.clean(int(rng.integers(len(self.store)))))
            )
            states = (states[first : first + frames].astype(np.float32) - self.mean) / self.std
            target[b, : len(states)] = states
            named = phoneme_labels(self.store.rows[i], len(whole) / 16_000)[first : first + frames]
            labels[b, : len(named)] = named
        return torch.from_numpy(audio), torch.from_numpy(target), torch.from_numpy(labels)


def phoneme_labels(row: dict[str, Any], duration_s: float, frame_s: float = FRAME_S) -> np.ndarray:
    """The phoneme in the middle of every frame, (T,), from the teacher's durations stretched to the audio's length."""
    ids = np.array([0, *row["phonemes"], 0])
    ends = np.cumsum(row["frames"]) * PHONEME_FRAME_S
    middles = (np.arange(int(duration_s / frame_s)) + 0.5) * frame_s
    at = np.searchsorted(ends * duration_s / ends[-1], middles)
    return ids[np.minimum(at, len(ids) - 1)]


@torch.no_grad()
def fit_normalisation(model: Student, batches: Batches) -> None:
    """CMVN over clean and degraded audio: shift is minus the mean, scale one over the deviation."""
    rng = np.random.default_rng(0)
    features = torch.cat([linguistic_features(batches.draw(rng)[0]).flatten(0, 1) for _ in range(12)])
    model.shift.copy_(-features.mean(0))
    model.scale.copy_(1 / features.std(0).clamp(min=1e-3))


@torch.no_grad()
def fit_codebook(model: Student, batches: Batches, device: torch.device) -> None:
    """k-means on hidden states of fresh batches."""
    rng, found = np.random.default_rng(1), []
    rounds = max(4, 40_000 // (batches.recipe.batch * 60))
    for _ in range(rounds):
        audio = batches.draw(rng)[0].to(device)
        hidden = model.encoder(model.features(audio))
        found.append(hidden.flatten(0, 1))
    model.codebook.fit(torch.cat(found), rounds=20)


def main() -> None:
    arguments = training_options(__doc__).parse_args()
    device, recipe = begin(arguments, CPU, GPU)
    torch.manual_seed(2)
    model = Student().to(device)
    optimizer = Optimizer(model, recipe.lr, outside=("to_",))
    parts = {"model": model, "optimizers": optimizer}
    run = Run("linguistic", parts, arguments.steps or recipe.steps, arguments.minutes)
    batches = Batches(Store(), recipe)
    if run.step == 0:
        fit_normalisation(model, batches)
    print(
        f"linguistic: {count_parameters(model.encoder):.2f} M parameters, {batches.store.hours:.2f} h on {device}",
        flush=True,
    )
    threshold = int(run.steps * recipe.quantize_from)
    while run.going:
        if run.step == threshold:
            fit_codebook(model, batches, device)
        audio, target, labels = (x.to(device) for x in batches.draw(run.rng()))
        set_lr(optimizer, cosine(run.step, run.steps, recipe.lr, recipe.final_lr))
        with products(device):
            losses = model(audio, target, labels, run.step >= threshold)
        total = losses["teacher"] + 0.5 * losses["phoneme"] + 0.25 * losses["commitment"]
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        run.done_step({key: value.detach() for key, value in losses.items()})


if __name__ == "__main__":
    main()
