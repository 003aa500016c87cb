"""Make released tokenizers bear noise without changing what they say of clean speech.

The released encoders are frozen teachers; a copy of each learns to give of a degraded recording the codes that the
teacher gives of the clean one, and of clean speech the same as before. Codebooks and normalisation stay, so language
model and flow stay valid. Only audio is needed: rows of `corpus` and `volume`.

    python -m services.trainer.recipes.nano.robust linguistic
    python -m services.trainer.recipes.nano.robust semantic
    python -m services.trainer.recipes.nano.robust export models/robust
    python -m services.trainer.recipes.nano.robust measure models/robust
"""

from __future__ import annotations

import argparse
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from services.trainer.recipes.nano import assets, augment, semantic
from services.trainer.recipes.nano.export import write_sums
from services.trainer.recipes.nano.features import corpus_rows
from services.trainer.recipes.nano.run import Optimizer, Run, cosine, pick_device, products, set_lr
from shared.audio.features import linguistic_features, linguistic_frames, whisper_log_mel
from shared.audio.signal import TOKEN_PEAK, through_pcm16
from shared.checkpoints.export import export_semantic_onnx, import_semantic_onnx, save_linguistic
from shared.checkpoints.layout import LINGUISTIC_FOLDER, TOKENIZER_FOLDER, Checkpoint
from shared.checkpoints.tokenizer import load_linguistic, load_semantic
from shared.models.linguistic import LinguisticEncoder
from shared.models.semantic import SemanticEncoder

RATE_HZ = 16_000
LINGUISTIC_FRAME = 960
"""Samples of a linguistic frame."""


@dataclass(frozen=True)
class RobustRecipe:
    """One training. Of the readings a share `clean` differs in level alone, a share `noisy` has plain noise, and the
    rest is a random recording situation (`augment.degrade`)."""

    steps: int
    temperature: float
    """Of the scores over the codebook: squared distances for linguistic codes, cosines for semantic ones."""
    batch_s: float = 44.0
    """Audio of a step, padding included."""
    longest_s: float = 9.0
    lr: float = 6e-4
    final_lr: float = 3e-5
    regression: float = 0.5
    clean: float = 0.3
    noisy: float = 0.5
    snr_db: tuple[float, float] = (0.0, 20.0)
    teachers: float = 0.4
    """Share of the batches that are the good teacher's; the others are virtual speakers'."""


RECIPES = {
    "linguistic": RobustRecipe(steps=4000, temperature=24.0),
    "semantic": RobustRecipe(steps=7500, temperature=0.03),
}


class Tokenizer(nn.Module, ABC):
    """An encoder and its codebook (K, D) as both trainings see them: audio to vectors, vectors to scores of codes."""

    codebook: Tensor

    def __init__(self, encoder: nn.Module, codebook: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("codebook", codebook)

    @abstractmethod
    def frames(self, lengths: Tensor) -> Tensor:
        """Codes (B,) of so many samples (B,)."""

    @abstractmethod
    def features(self, audio: Tensor, lengths: Tensor) -> Tensor:
        """16 kHz (B, n) with lengths (B,) in samples -> what the encoder reads."""

    @abstractmethod
    def vectors(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Features, and lengths (B,) in samples, to vectors (B, T, D) before the codebook."""

    @abstractmethod
    def scores(self, vectors: Tensor) -> Tensor:
        """Vectors (..., D) to scores (..., K); the code is the highest."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the files of this tokenizer into the `Step-Audio-Tokenizer` of a checkpoint."""


class Linguistic(Tokenizer):
    """The nearest of 1,024 centroids by Euclidean distance, at 16.67 Hz."""

    encoder: LinguisticEncoder
    cmvn: Tensor

    def __init__(self, checkpoint: Checkpoint) -> None:
        released = load_linguistic(checkpoint)
        super().__init__(released.encoder, released.centroids)
        self.register_buffer("cmvn", released.cmvn)

    def frames(self, lengths: Tensor) -> Tensor:
        return linguistic_frames(lengths)

    def features(self, audio: Tensor, lengths: Tensor) -> Tensor:
        return linguistic_features(audio, lengths, self.cmvn)

    def vectors(self, features: Tensor, lengths: Tensor) -> Tensor:
        found: Tensor = self.encoder(features, linguistic_frames(lengths))
        return found

    def scores(self, vectors: Tensor) -> Tensor:
        products = vectors @ self.codebook.T
        return 2 * products - vectors.square().sum(-1, keepdim=True) - self.codebook.square().sum(-1)

    def save(self, folder: Path) -> None:
        centroids = folder / "linguistic_tokenizer.npy"
        save_linguistic(self.encoder, self.cmvn, self.codebook, folder / LINGUISTIC_FOLDER, centroids, is_half=True)


class Semantic(Tokenizer):
    """The nearest of 4,096 codes by cosine, at 25 Hz."""

    encoder: SemanticEncoder

    def __init__(self, checkpoint: Checkpoint) -> None:
        encoder = import_semantic_onnx(checkpoint.semantic_onnx, semantic.CONFIG)
        super().__init__(encoder, F.normalize(encoder.codebook, dim=-1))

    def frames(self, lengths: Tensor) -> Tensor:
        return (lengths // 160 + 3) // 4

    def features(self, audio: Tensor, lengths: Tensor) -> Tensor:
        return whisper_log_mel(audio, lengths)

    def vectors(self, features: Tensor, lengths: Tensor) -> Tensor:
        return self.encoder.encode(features, lengths // 160)

    def scores(self, vectors: Tensor) -> Tensor:
        return vectors @ self.codebook.T

    def save(self, folder: Path) -> None:
        export_semantic_onnx(self.encoder, folder / "speech_tokenizer_v1.onnx", is_half=True)


KINDS: dict[str, Callable[[Checkpoint], Tokenizer]] = {"linguistic": Linguistic, "semantic": Semantic}


class Lesson(NamedTuple):
    """Degraded audio (B, n) with lengths (B,) in samples, the teacher's vectors (B, T, D) and codes (B, T) of the
    clean audio, codes -100 past a row's end, and which rows are clean (B,)."""

    heard: Tensor
    lengths: Tensor
    vectors: Tensor
    codes: Tensor
    clean: Tensor


Babble = Callable[[], np.ndarray]


def heard(
    clean: np.ndarray, kind: float, recipe: RobustRecipe, rng: np.random.Generator, babble: Babble
) -> tuple[np.ndarray, bool]:
    """A reading (n,) in a random situation of a `kind` in [0, 1), and whether only its level is another."""
    if kind < recipe.clean:
        return at_peak(clean, float(rng.uniform(0.3, TOKEN_PEAK))), True
    if kind < recipe.clean + recipe.noisy:
        noise = augment.any_noise(len(clean), rng, babble)
        return at_peak(augment.add_noise(clean, noise, float(rng.uniform(*recipe.snr_db)))), False
    return augment.degrade(clean, rng, babble), False


def at_peak(audio: np.ndarray, peak: float = TOKEN_PEAK) -> np.ndarray:
    """Scaled to a peak, as the front end scales what it tokenises."""
    return np.asarray(audio * (peak / max(1e-4, float(np.abs(audio).max()))), np.float32)


class Readings:
    """Recordings of the corpus at 16 kHz and full scale, shortest first, read when asked for."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = sorted(rows, key=lambda row: float(row["duration_s"]))
        self._audio: dict[int, np.ndarray] = {}

    @classmethod
    def of_corpus(cls, *, held_out: bool, longest_s: float) -> Readings:
        rows = corpus_rows(assets.data_dir() / "corpus")
        return cls([row for row in rows if row["held_out"] == held_out and row["duration_s"] <= longest_s])

    def __len__(self) -> int:
        return len(self.rows)

    def audio(self, i: int) -> np.ndarray:
        """Reading i, (n,) float32."""
        if i not in self._audio:
            file = assets.data_dir() / "corpus" / f"{self.rows[i]['index']:07d}.flac"
            samples, rate_hz = soundfile.read(file, dtype="float32")
            self._audio[i] = (at_peak(soxr.resample(samples, rate_hz, RATE_HZ)) * 32767).astype(np.int16)
        return self._audio[i].astype(np.float32) / 32767


class Lessons:
    """Batches of readings of about one length. What the teacher says of a reading is computed once."""

    def __init__(self, teacher: Tokenizer, readings: Readings, recipe: RobustRecipe) -> None:
        self.teacher, self.readings, self.recipe = teacher, readings, recipe
        virtual = [str(row["voice_name"]).startswith("virtual") for row in readings.rows]
        self.pools = [np.flatnonzero(np.array(virtual) == wanted) for wanted in (False, True)]
        self._targets: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.inference_mode()
    def target(self, i: int) -> tuple[Tensor, Tensor]:
        """The teacher's vectors (T, D) and codes (T,) of reading i."""
        if i not in self._targets:
            audio = through_pcm16(torch.from_numpy(self.readings.audio(i)))[None].to(self.teacher.codebook.device)
            lengths = torch.tensor([audio.shape[1]], device=audio.device)
            vectors = self.teacher.vectors(self.teacher.features(audio, lengths), lengths)[0].float()
            self._targets[i] = vectors.cpu(), self.teacher.scores(vectors).argmax(-1).cpu()
        return self._targets[i]

    def draw(self, rng: np.random.Generator) -> Lesson:
        filled = [pool for pool in self.pools if len(pool)]
        pool = filled[0] if len(filled) == 1 or rng.random() < self.recipe.teachers else filled[1]
        around = int(rng.integers(len(pool)))
        near = pool[max(0, around - 40) : around + 41]  # readings are in order of their length
        longest_s = float(self.readings.rows[near[-1]]["duration_s"])
        chosen = rng.choice(near, max(1, int(self.recipe.batch_s / longest_s)))
        places = np.arange(len(chosen)) + rng.random(len(chosen))
        kinds = places / len(chosen)  # so that each has its share of a batch
        made = [
            heard(self.readings.audio(int(i)), kind, self.recipe, rng, lambda: self._any(rng))
            for i, kind in zip(chosen, kinds, strict=True)
        ]
        rows = [through_pcm16(torch.from_numpy(audio)) for audio, _ in made]
        targets = [self.target(int(i)) for i in chosen]
        return Lesson(
            pad_sequence(rows, batch_first=True),
            torch.tensor([len(row) for row in rows]),
            pad_sequence([vectors for vectors, _ in targets], batch_first=True).clone(),
            pad_sequence([codes for _, codes in targets], batch_first=True, padding_value=-100.0).clone(),
            torch.tensor([clean for _, clean in made]),
        )

    def _any(self, rng: np.random.Generator) -> np.ndarray:
        return self.readings.audio(int(rng.integers(len(self.readings))))


def losses(student: Tokenizer, lesson: Lesson, recipe: RobustRecipe) -> dict[str, Tensor]:
    """Cross entropy over the codebook with the teacher's code as label, distance from its vector over that vector's
    variance, and the share of equal codes on clean and on degraded rows."""
    with torch.no_grad():
        features = student.features(lesson.heard, lesson.lengths)
    with products(lesson.heard.device):
        found = student.vectors(features, lesson.lengths)
    known = lesson.codes >= 0
    found, wanted, codes = found.float()[known], lesson.vectors[known], lesson.codes[known]
    scores = student.scores(found)
    right = (scores.argmax(-1) == codes).float()
    clean = lesson.clean[:, None].expand_as(known)[known]
    return {
        "code": F.cross_entropy(scores / recipe.temperature, codes),
        "vector": F.mse_loss(found, wanted) / wanted.var(0).mean(),
        "clean": right[clean].mean(),
        "degraded": right[~clean].mean(),
    }


def train(kind: str, checkpoint: Checkpoint, steps: int | None, minutes: float | None) -> None:
    """Train the copy of one encoder; goes on where a run stopped."""
    device, recipe = pick_device(), RECIPES[kind]
    torch.manual_seed(4)
    teacher = KINDS[kind](checkpoint).to(device).eval().requires_grad_(False)
    student = deepcopy(teacher).train()
    student.encoder.requires_grad_(True)
    optimizer = Optimizer(student.encoder, recipe.lr, outside=("positions",))
    parts = {"encoder": student.encoder, "optimizers": optimizer}
    run = Run(f"robust-{kind}", parts, steps or recipe.steps, minutes)
    lessons = Lessons(teacher, Readings.of_corpus(held_out=False, longest_s=recipe.longest_s), recipe)
    print(f"robust-{kind}: {len(lessons.readings)} readings on {device}", flush=True)
    while run.going:
        lesson = Lesson(*(x.to(device) for x in lessons.draw(run.rng())))
        set_lr(optimizer, cosine(run.step, run.steps, recipe.lr, recipe.final_lr))
        found = losses(student, lesson, recipe)
        optimizer.zero_grad()
        (found["code"] + recipe.regression * found["vector"]).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.encoder.parameters(), 5.0)
        optimizer.step()
        run.done_step({key: value.detach() for key, value in found.items()})


def export(checkpoint: Checkpoint, target: Path) -> None:
    """Write the checkpoint again with the trained encoders; every other file is the same. An encoder that has no run
    stays too."""
    if target.exists():
        raise SystemExit(f"{target} is there: name another folder")
    root = target.with_name(f".{target.name}.partial")
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(checkpoint.root, root)
    document = json.loads((root / "editx.json").read_text())
    for kind, build in KINDS.items():
        tokenizer = build(checkpoint)
        run = Run(f"robust-{kind}", {"encoder": tokenizer.encoder}, 0)
        if run.step == 0:
            print(f"{kind}: as released")
            continue
        document["steps"][f"robust-{kind}"] = run.step
        tokenizer.save(root / TOKENIZER_FOLDER)
    (root / "editx.json").write_text(json.dumps(document, indent=2) + "\n")
    write_sums(root)
    root.rename(target)
    print(f"{target}: written")


def situations(clean: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """A held-out reading (n,) as `measure` plays it: at half its level, in a room, in noise."""
    rng = np.random.default_rng((99, seed))
    noise = augment.any_noise(len(clean), rng)
    return {
        "clean": clean,
        "half the level": 0.5 * clean,
        "a room": at_peak(augment.reverberate(clean, 0.4, 0.5, rng)),
        **{f"{snr} dB": at_peak(augment.add_noise(clean, noise, float(snr))) for snr in (15, 10, 5, 0)},
    }


def measure(base: Checkpoint, changed: Checkpoint, number: int = 40) -> dict[str, tuple[float, float]]:
    """Share of codes, linguistic and semantic in per cent, that `changed` gives of a held-out reading in a situation
    and `base` gives of it clean."""
    readings = Readings.of_corpus(held_out=True, longest_s=12.0)
    chosen = np.random.default_rng(5).permutation(len(readings))[:number]
    equal: dict[str, list[tuple[float, float]]] = {}
    teachers, pupils = ((load_linguistic(c), load_semantic(c)) for c in (base, changed))
    for i in chosen:
        clean = readings.audio(int(i))
        wanted = [tokenizer.encode([torch.from_numpy(clean)])[0] for tokenizer in teachers]
        for name, audio in situations(clean, int(i)).items():
            found = [tokenizer.encode([torch.from_numpy(audio)])[0] for tokenizer in pupils]
            shares = [100 * float(np.mean(a == b)) for a, b in zip(found, wanted, strict=True)]
            equal.setdefault(name, []).append((shares[0], shares[1]))
    means = {name: np.mean(shares, axis=0) for name, shares in equal.items()}
    return {name: (float(mean[0]), float(mean[1])) for name, mean in means.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*KINDS, "export", "measure"])
    parser.add_argument("target", nargs="?", default="nano", help="the checkpoint that is written, or measured")
    parser.add_argument("--base", default="nano", help="the released checkpoint")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = Checkpoint.resolve(arguments.base)
    if arguments.task == "export":
        export(base, Path(arguments.target))
    elif arguments.task == "measure":
        for name, (linguistic, spoken) in measure(base, Checkpoint.resolve(arguments.target)).items():
            print(f"{name}: linguistic {linguistic:.1f} %, semantic {spoken:.1f} %")
    else:
        train(arguments.task, base, arguments.steps, arguments.minutes)


if __name__ == "__main__":
    main()
