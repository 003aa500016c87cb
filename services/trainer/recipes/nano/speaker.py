"""Train the speaker encoder: from degraded speech to the teacher's own description of the voice, and to who it is.

The teacher's voices are vectors, and mixes of voices are mixes of vectors, so the encoder can be taught the vector
itself (128 values of timbre), how far the formants were moved and whether the voice whispers, beside naming the
speaker. No judge is used as a teacher. `python -m services.trainer.recipes.nano.speaker`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.trainer.recipes.nano import assets, augment, teacher
from services.trainer.recipes.nano.features import Store
from services.trainer.recipes.nano.run import Run, begin, cosine, count_parameters, set_lr, training_options
from shared.audio.features import speaker_fbank
from shared.models.speaker import SpeakerConfig, SpeakerEncoder

CONFIG = SpeakerConfig(front_channels=8, channels=64, growth=16, bottleneck=64, blocks=(4, 6, 4))
TYPICAL_PHONEMES = 80
"""The row of a voice's style table that stands for the voice."""


@dataclass(frozen=True)
class SpeakerRecipe:
    steps: int
    batch: int
    seconds: float = 3.0
    lr: float = 2e-3
    final_lr: float = 1e-4


CPU = SpeakerRecipe(steps=1200, batch=16)
GPU = SpeakerRecipe(steps=5000, batch=128)


class Voices:
    """Targets of a row: the voice's timbre vector, normalised, with formant and whisper, (130,); and the number
    of its name."""

    def __init__(self, store: Store) -> None:
        folder = assets.prepare().voices
        styles = {
            f.stem: np.fromfile(f, np.float32).reshape(-1, 256)[TYPICAL_PHONEMES, teacher.TIMBRE]
            for f in folder.glob("*.bin")
        }
        everyone = np.stack(list(styles.values()))
        self._mean, self._std = everyone.mean(0), everyone.std(0)
        self._styles, self._store = styles, store
        self.names = sorted({row["voice_name"] for row in store.rows})
        self._number = {name: number for number, name in enumerate(self.names)}

    def __call__(self, i: int, formant: float) -> tuple[np.ndarray, int]:
        row = self._store.rows[i]
        manner = teacher.MANNERS[row["manner"]]
        timbre = sum(weight * self._styles[name] for name, weight in row["voice"].items())
        extra = [10 * float(np.log(formant * manner.formant)), 2.0 * manner.whisper]
        same_voice = formant == 1 and manner.formant == 1
        target = np.concatenate([(timbre - self._mean) / self._std, extra]).astype(np.float32)
        return target, self._number[row["voice_name"]] if same_voice else -100


class Pupil(nn.Module):
    """The encoder and two heads that are thrown away."""

    def __init__(self, speakers: int) -> None:
        super().__init__()
        self.encoder = SpeakerEncoder(CONFIG)
        self.to_voice = nn.Linear(CONFIG.embedding, 130)
        self.to_name = nn.Linear(CONFIG.embedding, speakers)

    def forward(self, features: Tensor, voice: Tensor, name: Tensor) -> dict[str, Tensor]:
        """Filter banks (B, T, 80), (B, 130), (B,) -> losses and how often the name is right."""
        embedding = self.encoder(features).float()
        logits = self.to_name(embedding)
        known = name >= 0
        return {
            "voice": F.mse_loss(self.to_voice(embedding), voice),
            "name": F.cross_entropy(logits, name, ignore_index=-100, label_smoothing=0.1),
            "right": ((logits.argmax(1) == name) & known).sum() / known.sum().clamp(min=1),
        }


def draw(
    store: Store, voices: Voices, recipe: SpeakerRecipe, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Degraded 16 kHz audio (B, n), one in three with moved formants, and the targets."""
    samples = round(recipe.seconds * 16_000)
    audio, targets, names = np.zeros((recipe.batch, samples), np.float32), [], []
    for b in range(recipe.batch):
        i = int(rng.integers(len(store)))
        formant = float(rng.choice([1.0, 1.0, rng.uniform(0.84, 1.2)]))
        whole = soxr.resample(store.audio(i), 24_000 * formant, 16_000)
        piece = np.resize(whole[int(rng.integers(max(1, len(whole) - samples))) :], samples)
        audio[b] = augment.degrade(np.asarray(piece, np.float32), rng)
        target, name = voices(i, formant)
        targets.append(target)
        names.append(name)
    return torch.from_numpy(audio), torch.from_numpy(np.stack(targets)), torch.tensor(names)


def main() -> None:
    arguments = training_options(__doc__).parse_args()
    device, recipe = begin(arguments, CPU, GPU)
    torch.manual_seed(4)
    store = Store()
    voices = Voices(store)
    model = Pupil(512).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=0.02)
    run = Run("speaker", {"model": model, "optimizer": optimizer}, arguments.steps or recipe.steps, arguments.minutes)
    print(
        f"speaker: {count_parameters(model.encoder):.2f} M parameters, {len(voices.names)} voices on {device}",
        flush=True,
    )
    while run.going:
        audio, target, name = (x.to(device) for x in draw(store, voices, recipe, run.rng()))
        set_lr(optimizer, cosine(run.step, run.steps, recipe.lr, recipe.final_lr))
        losses = model(speaker_fbank(audio), target, name)
        optimizer.zero_grad()
        (losses["voice"] + 0.5 * losses["name"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        run.done_step({key: value.detach() for key, value in losses.items()})


if __name__ == "__main__":
    main()
