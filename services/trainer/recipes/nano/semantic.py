"""Train the semantic tokenizer: 4096 codes at 25 Hz that carry what the linguistic codes leave out.

Whisper's first layers hear, frozen; blocks of our own and a cosine codebook say in one code what they heard for 40 ms.
A decoder is thrown away: from the code, the linguistic centroid and the excerpt's mean and deviation of the mel (so
that the code need not carry the voice) it must give the clean mel, F0, Whisper's last states and the phoneme. The audio
is degraded. `python -m services.trainer.recipes.nano.semantic`, after `linguistic`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.trainer.core.objectives import masked_mean
from services.trainer.recipes.nano import augment, linguistic
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
    trained,
    training_options,
)
from services.trainer.recipes.nano.whisper import HIDDEN, WhisperEncoder
from shared.audio.features import prompt_mel, whisper_log_mel
from shared.checkpoints.layout import Checkpoint
from shared.checkpoints.tokenizer import load_linguistic
from shared.codes import GROUP_S
from shared.models.linguistic import nearest
from shared.models.semantic import WhisperSemanticConfig, WhisperSemanticEncoder
from shared.models.spectral import ConvNeXtBlock

CONFIG = WhisperSemanticConfig()
WIDTH = 256
MEL_MEAN, MEL_STD = -6.0, 2.5
TEACHER_EVERY = 3
"""Mel frames of 20 ms to one averaged state."""

Units = Callable[[Tensor], Tensor]
"""16 kHz (B, n) to the linguistic tokenizer's centroid vectors (B, T, width), one for 60 ms."""


@dataclass(frozen=True)
class SemanticRecipe:
    steps: int
    batch: int
    seconds: float = 3.0
    lr: float = 1.5e-3
    final_lr: float = 5e-5
    quantize_from: int = 300


CPU = SemanticRecipe(steps=2800, batch=16)
GPU = SemanticRecipe(steps=10_000, batch=96, quantize_from=500)


class Target(NamedTuple):
    """What the decoder must give: F0 (B, T) at 50 Hz, Whisper's last states (B, T / 3, 512) and phonemes (B, T / 2)
    with -100 where unknown; `real` (B, T) marks what lies inside the reading."""

    f0: Tensor
    teacher: Tensor
    phonemes: Tensor
    real: Tensor


class Autoencoder(nn.Module):
    """The tokenizer's encoder, its codebook while it learns, and the decoder."""

    def __init__(self, linguistic_width: int) -> None:
        super().__init__()
        self.encoder = WhisperSemanticEncoder(CONFIG)
        self.codebook = Codebook(CONFIG.codebook_size, CONFIG.codebook_dim, cosine=True)
        self.from_code = nn.Linear(CONFIG.codebook_dim, WIDTH)
        self.from_linguistic = nn.Linear(linguistic_width, WIDTH)
        self.from_voice = nn.Linear(160, WIDTH)
        self.blocks = nn.Sequential(*[ConvNeXtBlock(WIDTH, 3, 4) for _ in range(6)])
        self.to_mel = nn.Linear(WIDTH, 80)
        self.to_pitch = nn.Linear(WIDTH, 2)
        self.to_teacher = nn.Linear(WIDTH, HIDDEN)
        self.to_phoneme = nn.Linear(WIDTH, linguistic.PHONEMES)

    def forward(self, feats: Tensor, units: Tensor, mel: Tensor, target: Target, quantized: bool) -> dict[str, Tensor]:
        """feats (B, 80, 2 T), units (B, about T / 3, width) linguistic centroids, mel (B, T, 80), T a multiple of 6."""
        real = target.real.float()
        vectors = self.encoder.encode(feats, 2 * real.sum(1).int()).float()
        commitment, used = vectors.new_zeros(()), vectors.new_zeros(())
        if quantized:
            inside = target.real[:, ::2]
            found, codes, commitment = self.codebook(vectors[inside])
            vectors = torch.zeros_like(vectors).masked_scatter(inside[..., None], found)
            used = torch.tensor(float(len(codes.unique())), device=vectors.device)
        at = torch.arange(mel.shape[1], device=feats.device)
        mel = (mel - MEL_MEAN) / MEL_STD
        x = (
            self.from_code(vectors)[:, at // 2]
            + self.from_linguistic(units)[:, (at // 3).clamp(max=units.shape[1] - 1)]
            + self.from_voice(statistics(mel, real))[:, None]
        )
        x = self.blocks((x * real[..., None]).transpose(1, 2)).transpose(1, 2)
        pitch, voicing = self.to_pitch(x).float().unbind(-1)
        voiced = (target.f0 > 0) & target.real
        wanted = torch.log(target.f0.clamp(min=50)) - 5.0
        guess = self.to_teacher(x).float().unflatten(1, (-1, TEACHER_EVERY)).mean(2)
        heard = real[:, ::TEACHER_EVERY]
        named = target.phonemes
        known, spelled = named >= 0, self.to_phoneme(x[:, ::2]).float()
        return {
            "phoneme": F.cross_entropy(spelled.flatten(0, 1), named.flatten(), ignore_index=-100),
            "accuracy": ((spelled.argmax(-1) == named) & known).sum() / known.sum().clamp(min=1),
            "mel": masked_mean((self.to_mel(x).float() - mel).abs().mean(-1), real),
            "pitch": masked_mean((pitch - wanted).abs(), voiced),
            "voicing": masked_mean(F.binary_cross_entropy_with_logits(voicing, voiced.float(), reduction="none"), real),
            "teacher": masked_mean(1 - F.cosine_similarity(guess, target.teacher, dim=-1), heard),
            "commitment": commitment,
            "used": used,
        }


def statistics(mel: Tensor, real: Tensor) -> Tensor:
    """Mean and deviation (B, 160) of mels (B, T, 80) over the frames `real` (B, T)."""
    counts = real.sum(1, keepdim=True).clamp(min=1)
    mean = (mel * real[..., None]).sum(1) / counts
    spread = ((mel - mean[:, None]).square() * real[..., None]).sum(1) / counts
    return torch.cat([mean, spread.sqrt()], 1)


def fill_trunk(encoder: WhisperSemanticEncoder, whisper: WhisperEncoder) -> None:
    """Copy Whisper's convolutions and first layers into an encoder."""
    encoder.trunk.load_state_dict(whisper.first_layers(encoder.config.layers))


def open_units(checkpoint: str | None, device: torch.device) -> Units:
    """The linguistic tokenizer of the run before, or of a checkpoint."""
    if checkpoint is not None:
        released = load_linguistic(Checkpoint.resolve(checkpoint), device=device)

        def of_release(audio: Tensor) -> Tensor:
            codes = np.stack(released.encode(list(audio)))
            return released.centroids[torch.from_numpy(codes).long().to(device)]

        return of_release
    student = trained("linguistic", "model", linguistic.Student()).to(device)
    assert isinstance(student, linguistic.Student)
    centroids = student.codebook.centroids

    @torch.no_grad()
    def of_run(audio: Tensor) -> Tensor:
        return centroids[nearest(student.encoder(student.features(audio)), centroids)]

    return of_run


def draw(store: Store, recipe: SemanticRecipe, rng: np.random.Generator) -> tuple[Tensor, Tensor, Target]:
    """Degraded 16 kHz (B, n), the clean mel (B, T, 80), and the target.

    Excerpts begin on the grid of groups, where codes of both kinds and Whisper's averaged states begin.
    """
    groups = round(recipe.seconds / GROUP_S)
    frames, samples = 6 * groups, round(groups * GROUP_S * 16_000)
    heard = np.zeros((recipe.batch, samples), np.float32)
    mels = np.zeros((recipe.batch, frames, 80), np.float32)
    pitch = np.zeros((recipe.batch, frames), np.float32)
    teacher = np.zeros((recipe.batch, frames // TEACHER_EVERY, HIDDEN), np.float32)
    phonemes, real = np.full((recipe.batch, frames // 2), -100), np.zeros((recipe.batch, frames), bool)
    for b in range(recipe.batch):
        i = int(rng.integers(len(store)))
        audio, states, f0 = store.audio(i), store.array(i, "last"), store.array(i, "f0").astype(np.float32)
        group = int(rng.integers(max(1, len(states) // 2 - groups + 1)))
        piece = audio[group * 2880 :][: groups * 2880]
        piece = piece / max(1e-4, float(np.abs(piece).max())) * 0.999
        low = np.asarray(soxr.resample(piece, 24_000, 16_000), np.float32)[:samples]
        heard[b, : len(low)] = augment.degrade(low, rng)
        inside = min(frames, len(piece) // 960 * 2)
        real[b, :inside] = True
        mels[b, :inside] = prompt_mel(torch.from_numpy(piece)).numpy()[:inside]
        at = 12 * group + 1 + 2 * np.arange(frames)
        pitch[b] = np.where(at < len(f0), f0[np.minimum(at, len(f0) - 1)], 0)
        states = states[2 * group :][: teacher.shape[1]]
        teacher[b, : len(states)] = states
        named = linguistic.phoneme_labels(store.rows[i], len(audio) / 24_000, 0.04)[3 * group :][: inside // 2]
        phonemes[b, : len(named)] = named
    heard /= np.maximum(1e-4, np.abs(heard).max(1, keepdims=True)) / 0.999
    target = Target(*(torch.from_numpy(array) for array in (pitch, teacher, phonemes, real)))
    return torch.from_numpy(heard), torch.from_numpy(mels), target


@torch.no_grad()
def fit_codebook(model: Autoencoder, store: Store, recipe: SemanticRecipe, device: torch.device) -> None:
    """k-means on vectors of fresh batches."""
    rng, found = np.random.default_rng(3), []
    for _ in range(max(10, 30_000 // (recipe.batch * 75))):
        heard, _, target = draw(store, recipe, rng)
        real = target.real.to(device)
        vectors = model.encoder.encode(whisper_log_mel(heard.to(device), bins=CONFIG.bins), 2 * real.sum(1).int())
        found.append(vectors[real[:, ::2]])
    model.codebook.fit(torch.cat(found), rounds=12)


def main() -> None:
    parser = training_options(__doc__)
    parser.add_argument("--checkpoint", help="linguistic codes by its tokenizer, not by that of the run")
    arguments = parser.parse_args()
    device, recipe = begin(arguments, CPU, GPU)
    torch.manual_seed(3)
    units, store = open_units(arguments.checkpoint, device), Store()
    model = Autoencoder(linguistic.CONFIG.output_size)
    fill_trunk(model.encoder, WhisperEncoder.of_assets("cpu", torch.float32))
    model.to(device)
    optimizer = Optimizer(model, recipe.lr, outside=("to_", "from_"))
    parts = {"model": model, "optimizers": optimizer}
    run = Run("semantic", parts, arguments.steps or recipe.steps, arguments.minutes)
    print(f"semantic: {count_parameters(model.encoder):.2f} M parameters, {store.hours:.2f} h on {device}", flush=True)
    while run.going:
        if run.step == recipe.quantize_from:
            fit_codebook(model, store, recipe, device)
        heard, mel, target = draw(store, recipe, run.rng())
        heard, mel, target = heard.to(device), mel.to(device), Target(*(x.to(device) for x in target))
        set_lr(optimizer, cosine(run.step, run.steps, recipe.lr, recipe.final_lr))
        feats = whisper_log_mel(heard, bins=CONFIG.bins)
        with products(device):
            losses = model(feats, units(heard), mel, target, run.step >= recipe.quantize_from)
        total = (
            losses["mel"]
            + losses["pitch"]
            + 0.2 * losses["voicing"]
            + 1.5 * losses["teacher"]
            + 0.2 * losses["phoneme"]
            + 0.25 * losses["commitment"]
        )
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        run.done_step({key: value.detach() for key, value in losses.items()})


if __name__ == "__main__":
    main()
