"""Train the semantic tokenizer: 4096 codes at 25 Hz that carry what the linguistic codes leave out.

Encoder, cosine codebook, and a decoder that is thrown away: from the code, the linguistic centroid and the
excerpt's mean and deviation of the mel (so that the code need not carry the voice) it must give the clean mel, F0,
Whisper's third layer and the phoneme. The encoder hears degraded audio. `python -m
services.trainer.recipes.nano.semantic`, after `linguistic`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    training_options,
)
from shared.audio.features import prompt_mel, whisper_log_mel
from shared.models.linguistic import nearest
from shared.models.semantic import SemanticConfig, SemanticEncoder
from shared.models.spectral import ConvNeXtBlock

CONFIG = SemanticConfig(size=224, heads=4, layers=4, codebook_dim=32)
WIDTH = 224
MEL_MEAN, MEL_STD = -6.0, 2.5


@dataclass(frozen=True)
class SemanticRecipe:
    steps: int
    batch: int
    seconds: float = 3.0
    lr: float = 1.5e-3
    final_lr: float = 1e-4
    quantize_from: int = 300


CPU = SemanticRecipe(steps=5000, batch=12)
GPU = SemanticRecipe(steps=10_000, batch=96, quantize_from=500)


class Target(NamedTuple):
    """What the decoder must give: F0 at 50 Hz (B, T), and at 25 Hz Whisper's states (B, T25, 512) and phonemes (B,
    T25) with -100 where unknown."""

    f0: Tensor
    teacher: Tensor
    phonemes: Tensor


class Autoencoder(nn.Module):
    """The tokenizer's encoder, its codebook while it learns, and the decoder."""

    def __init__(self, linguistic_width: int) -> None:
        super().__init__()
        self.encoder = SemanticEncoder(CONFIG)
        self.codebook = Codebook(CONFIG.codebook_size, CONFIG.codebook_dim, cosine=True)
        self.from_code = nn.Linear(CONFIG.codebook_dim, WIDTH)
        self.from_linguistic = nn.Linear(linguistic_width, WIDTH)
        self.from_voice = nn.Linear(160, WIDTH)
        self.blocks = nn.Sequential(*[ConvNeXtBlock(WIDTH, 3, 4) for _ in range(4)])
        self.to_mel = nn.Linear(WIDTH, 80)
        self.to_pitch = nn.Linear(WIDTH, 2)
        self.to_teacher = nn.Linear(WIDTH, 512)
        self.to_phoneme = nn.Linear(WIDTH, linguistic.PHONEMES)

    def forward(self, feats: Tensor, units: Tensor, mel: Tensor, target: Target, quantized: bool) -> dict[str, Tensor]:
        """feats (B, 128, T100), units (B, T16, width) linguistic centroids, mel (B, T50, 80)."""
        f0, teacher = target.f0, target.teacher
        lengths = torch.full((len(feats),), feats.shape[2], device=feats.device)
        vectors = self.encoder.encode(feats, lengths).float()
        commitment, used = vectors.new_zeros(()), vectors.new_zeros(())
        if quantized:
            vectors, codes, commitment = self.codebook(vectors)
            used = torch.tensor(float(len(codes.unique())), device=vectors.device)
        frames = min(2 * vectors.shape[1], mel.shape[1], 2 * teacher.shape[1], 3 * units.shape[1]) // 2 * 2
        at = torch.arange(frames, device=feats.device)
        mel, f0 = (mel[:, :frames] - MEL_MEAN) / MEL_STD, f0[:, :frames]
        voice = torch.cat([mel.mean(1), mel.std(1)], 1)
        x = (
            self.from_code(vectors)[:, at // 2]
            + self.from_linguistic(units)[:, at // 3]
            + self.from_voice(voice)[:, None]
        )
        x = self.blocks(x.transpose(1, 2)).transpose(1, 2)
        pitch, voicing = self.to_pitch(x).float().unbind(-1)
        voiced = f0 > 0
        wanted = torch.log(f0.clamp(min=50)) - 5.0
        guess = self.to_teacher(x[:, ::2])
        named = target.phonemes[:, : frames // 2]
        known, spelled = named >= 0, self.to_phoneme(x[:, : 2 * named.shape[1] : 2]).float()
        return {
            "phoneme": F.cross_entropy(spelled.flatten(0, 1), named.flatten(), ignore_index=-100),
            "accuracy": ((spelled.argmax(-1) == named) & known).sum() / known.sum().clamp(min=1),
            "mel": F.l1_loss(self.to_mel(x).float(), mel),
            "pitch": ((pitch - wanted).abs() * voiced).sum() / voiced.sum().clamp(min=1),
            "voicing": F.binary_cross_entropy_with_logits(voicing, voiced.float()),
            "teacher": (1 - F.cosine_similarity(guess, teacher[:, : frames // 2], dim=-1)).mean(),
            "commitment": commitment,
            "used": used,
        }


class Units:
    """The frozen linguistic tokenizer of the run before: audio to its centroid vectors."""

    def __init__(self, device: torch.device) -> None:
        student = linguistic.Student()
        run = Run("linguistic", {"model": student}, 0)
        if run.step == 0:
            raise SystemExit("train the linguistic tokenizer first: python -m services.trainer.recipes.nano.linguistic")
        self.student = student.to(device).eval()

    @torch.inference_mode()
    def __call__(self, audio: Tensor) -> Tensor:
        """16 kHz (B, n) -> (B, T, width)."""
        s = self.student
        hidden = s.encoder(s.features(audio))
        return s.codebook.centroids[nearest(hidden, s.codebook.centroids)]


def draw(store: Store, recipe: SemanticRecipe, rng: np.random.Generator) -> tuple[Tensor, Tensor, Target]:
    """Degraded 16 kHz (B, n), clean 24 kHz (B, 1.5 n), and the target."""
    samples = round(recipe.seconds * 16_000)
    heard, clean = np.zeros((recipe.batch, samples), np.float32), np.zeros((recipe.batch, samples * 3 // 2), np.float32)
    pitch, teacher = (
        np.zeros((recipe.batch, samples // 320), np.float32),
        np.zeros((recipe.batch, samples // 640, 512), np.float32),
    )
    phonemes = np.full((recipe.batch, samples // 640), -100)
    for b in range(recipe.batch):
        i = int(rng.integers(len(store)))
        audio, states, f0 = store.audio(i), store.array(i, "middle"), store.array(i, "f0").astype(np.float32)
        first = int(rng.integers(max(1, len(states) - samples // 640)))
        piece = audio[first * 960 :][: samples * 3 // 2]
        piece = piece / max(1e-4, float(np.abs(piece).max())) * float(rng.uniform(0.3, 0.999))
        clean[b, : len(piece)] = piece
        low = np.asarray(soxr.resample(piece, 24_000, 16_000), np.float32)[:samples]
        heard[b, : len(low)] = augment.degrade(low, rng)
        at = 4 * first + 1 + 2 * np.arange(pitch.shape[1])
        pitch[b] = np.where(at < len(f0), f0[np.minimum(at, len(f0) - 1)], 0)
        states = states[first : first + teacher.shape[1]]
        teacher[b, : len(states)] = states
        named = linguistic.phoneme_labels(store.rows[i], len(audio) / 24_000, 0.04)[first : first + len(states)]
        phonemes[b, : len(named)] = named
    heard /= np.maximum(1e-4, np.abs(heard).max(1, keepdims=True)) / 0.999
    target = Target(torch.from_numpy(pitch), torch.from_numpy(teacher), torch.from_numpy(phonemes))
    return torch.from_numpy(heard), torch.from_numpy(clean), target


@torch.no_grad()
def fit_codebook(model: Autoencoder, store: Store, recipe: SemanticRecipe, device: torch.device) -> None:
    """k-means on vectors of fresh batches."""
    rng, found = np.random.default_rng(3), []
    for _ in range(max(10, 30_000 // (recipe.batch * 75))):
        feats = whisper_log_mel(draw(store, recipe, rng)[0].to(device))
        lengths = torch.full((len(feats),), feats.shape[2], device=device)
        found.append(model.encoder.encode(feats, lengths).flatten(0, 1))
    model.codebook.fit(torch.cat(found), rounds=12)


def main() -> None:
    arguments = training_options(__doc__).parse_args()
    device, recipe = begin(arguments, CPU, GPU)
    torch.manual_seed(3)
    units, store = Units(device), Store()
    model = Autoencoder(linguistic.CONFIG.output_size).to(device)
    optimizer = Optimizer(model, recipe.lr, outside=("to_", "from_", "positions"))
    parts = {"model": model, "optimizers": optimizer}
    run = Run("semantic", parts, arguments.steps or recipe.steps, arguments.minutes)
    print(f"semantic: {count_parameters(model.encoder):.2f} M parameters, {store.hours:.2f} h on {device}", flush=True)
    while run.going:
        if run.step == recipe.quantize_from:
            fit_codebook(model, store, recipe, device)
        heard, clean, target = draw(store, recipe, run.rng())
        heard, clean, target = heard.to(device), clean.to(device), Target(*(x.to(device) for x in target))
        set_lr(optimizer, cosine(run.step, run.steps, recipe.lr, recipe.final_lr))
        with torch.no_grad():
            feats, mel, known = whisper_log_mel(heard), prompt_mel(clean), units(heard).clone()
        with products(device):
            losses = model(feats, known, mel, target, run.step >= recipe.quantize_from)
        total = (
            losses["mel"]
            + losses["pitch"]
            + 0.2 * losses["voicing"]
            + losses["teacher"]
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
