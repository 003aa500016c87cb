"""How a recording sounds, as a dozen numbers, and classifiers and scores on top of them that run offline.

Features are of the voice's pitch, loudness, spectrum and pace; a pair's features are the changes from one recording to
another of the same voice, which is what an edit makes. Where the words are known, so is the rate of speaking; it is
what tells most manners apart. The judge is a regularised linear classifier, so that it cannot
learn more than the features say. Knows nothing about checkpoints or codes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from shared.errors import UserError

RATE_HZ = 16_000
FRAME, HOP = 640, 160
F0_LOW_HZ, F0_HIGH_HZ, VOICED = 60.0, 450.0, 0.5
F0_REACH = (0.6, 1.9)
"""How far F0 goes from a recording's median; further away are errors of an octave."""
FEATURES = (
    "f0", "f0_spread", "f0_range", "f0_low", "f0_high", "voiced", "level", "dynamics", "tilt", "centroid", "highs",
    "pace", "pauses", "rate",
)  # fmt: skip
RATE = FEATURES.index("rate")
NEUTRAL = "neutral"
"""The label of a recording that was not edited, which every task's classifier knows."""
PAIR_FEATURES = (*FEATURES, "duration")

Vector = npt.NDArray[np.float64]
Audio = npt.NDArray[np.float32]


def _frames(audio: Audio) -> npt.NDArray[np.float64]:
    padded = np.pad(audio.astype(np.float64), (0, max(0, FRAME - len(audio))))
    return np.lib.stride_tricks.sliding_window_view(padded, FRAME)[::HOP]


def pitch(audio: Audio) -> Vector:
    """F0 in Hz of 10 ms frames of 16 kHz audio (n,), 0 where unvoiced, by normalised autocorrelation.

    Twice: the second time near the median of the first, which avoids errors of an octave.
    """
    frames = _frames(audio)
    frames = frames - frames.mean(1, keepdims=True)
    spectrum = np.fft.rfft(frames, 2 * FRAME)
    correlation = np.fft.irfft(spectrum * spectrum.conj())[:, :FRAME]
    first = _pitch_within(correlation, F0_LOW_HZ, F0_HIGH_HZ)
    if not (first > 0).any():
        return first
    median = float(np.median(first[first > 0]))
    low, high = (median * reach for reach in F0_REACH)
    return _pitch_within(correlation, max(low, F0_LOW_HZ), high)


def _pitch_within(correlation: npt.NDArray[np.float64], low_hz: float, high_hz: float) -> Vector:
    """The pitch between two bounds from the frames' autocorrelation (frames, FRAME)."""
    energy = correlation[:, :1]
    taper = np.arange(FRAME, 0, -1) / FRAME
    normal = correlation / np.maximum(energy, 1e-9) / taper
    low, high = int(RATE_HZ / high_hz), min(int(RATE_HZ / low_hz) + 1, FRAME - 1)
    region = normal[:, low:high]
    best = region.argmax(1)
    strong = region >= 0.92 * region.max(1, keepdims=True)  # the first strong peak, against octave errors
    peaks = strong & (region >= np.roll(region, 1, 1)) & (region >= np.roll(region, -1, 1))
    first = np.where(peaks.any(1), peaks.argmax(1), best)
    loud = energy[:, 0] > 1e-3 * max(float(np.percentile(energy, 95)), 1e-9)
    voiced = (region.max(1) > VOICED) & loud
    return np.where(voiced, RATE_HZ / (first + low), 0.0)


def _letters(text: str) -> int:
    """How much there is to say: letters outside of [tags], a Chinese character for three."""
    words = re.sub(r"\[[^]]*\]", " ", text).lower()
    return len(re.findall(r"[a-z]", words)) + 3 * len(re.findall(r"[\u4e00-\u9fff]", words))


def features(audio: Audio, text: str = "") -> Vector:
    """The numbers named by FEATURES for 16 kHz audio (n,): octaves, semitones, dB, shares and syllables per second.

    The last, log2 of letters per second, needs the words that are said; it is 0 without.

    Raises UserError for audio that is empty, silent or holds NaN.
    """
    if not len(audio) or not np.isfinite(audio).all() or float(np.abs(audio).max()) < 1e-4:
        raise UserError("The recording is empty, silent or holds values that are no numbers.", code="invalid_audio")
    frames = _frames(audio)
    power = (frames**2).mean(1) + 1e-9
    decibels = 10 * np.log10(power)
    active = decibels > decibels.max() - 35
    f0 = pitch(audio)[: len(active)]
    voiced = f0[(f0 > 0) & active]
    octaves = np.log2(voiced) if len(voiced) else np.zeros(1)
    spectrum = (np.abs(np.fft.rfft(frames[active] * np.hanning(FRAME))) ** 2).mean(0) + 1e-12
    spectrum = np.maximum(spectrum, 1e-7 * spectrum.max())  # 70 dB below the peak nothing is heard
    hertz = np.fft.rfftfreq(FRAME, 1 / RATE_HZ)
    bands = [
        10 * np.log10(spectrum[(hertz >= a) & (hertz < b)].mean()) for a, b in ((100, 1000), (1000, 4000), (4000, 8000))
    ]
    smooth = np.convolve(decibels, np.hanning(9) / np.hanning(9).sum(), mode="same")
    rising = (smooth[1:-1] > smooth[:-2]) & (smooth[1:-1] >= smooth[2:]) & (smooth[1:-1] > decibels.max() - 20)
    low, high = np.percentile(octaves, [10, 90])
    spoken = np.flatnonzero(decibels > decibels.max() - 25)
    letters, span_s = _letters(text), (spoken[-1] - spoken[0] + 1) * HOP / RATE_HZ
    return np.array([
        float(np.median(octaves)), 12 * float(octaves.std()), 12 * float(high - low), float(low), float(high),
        len(voiced) / max(1, active.sum()),
        10 * np.log10(np.mean(np.sort(power)[len(power) // 2 :])), float(decibels[active].std()), bands[1] - bands[0],
        float(np.log2((spectrum * hertz).sum() / spectrum.sum())), bands[2] - bands[0],
        float(rising.sum() / (len(audio) / RATE_HZ)), 1 - float(active.mean()),
        float(np.log2(letters / span_s)) if letters else 0.0,
    ])  # fmt: skip


def change(source: Audio, target: Audio, texts: tuple[str, str] = ("", "")) -> Vector:
    """Changes of the FEATURES from source to target, which say the two texts; no change of rate without both."""
    moved = np.asarray(features(target, texts[1]) - features(source, texts[0]))
    if not all(texts):
        moved[RATE] = 0.0
    return moved


def pair_features(source: Audio, target: Audio) -> Vector:
    """PAIR_FEATURES of two readings of one text: the changes, and log2 of the ratio of durations."""
    return np.append(change(source, target), np.log2(len(target) / len(source)))


@dataclass(frozen=True, eq=False)
class Classifier:
    """Softmax regression on standardised features: labels, mean (d,), scale (d,), weights (d + 1, labels)."""

    labels: tuple[str, ...]
    mean: Vector
    scale: Vector
    weights: Vector

    @classmethod
    def fit(cls, x: npt.ArrayLike, labels: Sequence[str], *, ridge: float = 1e-2) -> Classifier:
        """Train on vectors (n, d) and their labels; always the same result."""
        data = np.asarray(x, np.float64)
        names = tuple(sorted(set(labels)))
        if len(names) < 2:
            raise UserError("A classifier needs examples of two labels at least.", code="invalid_training")
        mean, scale = data.mean(0), data.std(0) + 1e-6
        inputs = torch.from_numpy(np.column_stack([(data - mean) / scale, np.ones(len(data))]))
        wanted = torch.tensor([names.index(label) for label in labels])
        weights = torch.zeros(inputs.shape[1], len(names), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(inputs @ weights, wanted) + ridge * weights[:-1].square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return cls(names, mean, scale, weights.detach().numpy())

    def probabilities(self, x: npt.ArrayLike) -> Vector:
        """(n, d) -> (n, labels)."""
        data = np.atleast_2d(np.asarray(x, np.float64))
        logits = np.column_stack([(data - self.mean) / self.scale, np.ones(len(data))]) @ self.weights
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(odds / odds.sum(1, keepdims=True))

    def predict(self, x: npt.ArrayLike) -> list[str]:
        """The likeliest label of each vector."""
        return [self.labels[k] for k in self.probabilities(x).argmax(1)]

    def document(self) -> dict[str, object]:
        """As plain data."""
        return {"labels": list(self.labels), "mean": self.mean.tolist(), "scale": self.scale.tolist(),
                "weights": self.weights.tolist()}  # fmt: skip

    @classmethod
    def from_document(cls, document: dict[str, list[float]]) -> Classifier:
        labels = tuple(str(label) for label in document["labels"])
        return cls(labels, *(np.asarray(document[name], np.float64) for name in ("mean", "scale", "weights")))


@dataclass(frozen=True)
class AcousticJudge:
    """Which emotion or style a recording has relative to a neutral one of the same voice, per task ("emotion", ...).

    Each task's classifier knows the label "neutral" besides the task's tags.
    """

    tasks: dict[str, Classifier]

    def label(self, task: str, source: Audio, audio: Audio, texts: tuple[str, str] = ("", "")) -> str:
        """The label of `audio` given the neutral `source`, both 16 kHz, and where known what they say."""
        return self._task(task).predict(change(source, audio, texts)[None])[0]

    def score(self, task: str, tag: str, source: Audio, audio: Audio, texts: tuple[str, str] = ("", "")) -> float:
        """Probability of the wanted tag, 0 to 1; 0 for a tag that the judge was not trained on."""
        return self.score_change(task, tag, change(source, audio, texts))

    def score_change(self, task: str, tag: str, moved: Vector) -> float:
        """The score from the changes of the features (len(FEATURES),)."""
        found = self._task(task)
        return float(found.probabilities(moved)[0, found.labels.index(tag)]) if tag in found.labels else 0.0

    def rating(self, task: str, tag: str, source: Audio, audio: Audio, texts: tuple[str, str] = ("", "")) -> float:
        """The score as a rating from 1 to 10."""
        return 1 + 9 * self.score(task, tag, source, audio, texts)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({task: found.document() for task, found in self.tasks.items()}), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> AcousticJudge:
        """Raises UserError when there is none."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            tasks = {task: Classifier.from_document(found) for task, found in document.items()}
            if any(len(found.mean) != len(FEATURES) for found in tasks.values()):
                raise ValueError(f"it was fitted on other features than these {len(FEATURES)}")
            return cls(tasks)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is no acoustic judge: {error}.", "Train one with `editx eval fit-judge`.",
                            "judge_not_found") from error  # fmt: skip

    def _task(self, task: str) -> Classifier:
        if task not in self.tasks:
            raise UserError(f"The judge knows no task {task!r}.", f"It knows {', '.join(self.tasks)}.", "unknown_task")
        return self.tasks[task]
