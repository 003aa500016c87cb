"""Judges that run offline: words (two recognisers), voice, naturalness, background, pitch.

Each is loaded on first use and takes 16 kHz float32 audio (n,). What they are and how far to trust them is in
docs/model-card.md. Knows nothing about checkpoints or datasets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.trainer.recipes.nano.features import F0Tracker, stub_torchaudio

_NOT_A_WORD = re.compile(r"[^a-z' ]+")
_NOT_HAN = re.compile(r"[^\u4e00-\u9fff]")


def words(text: str, language: str = "en") -> list[str]:
    """What an error rate counts: lower-case words, or single characters in Mandarin."""
    if language == "zh":
        return list(_NOT_HAN.sub("", text))
    return _NOT_A_WORD.sub(" ", text.lower().replace("-", " ")).split()


def word_errors(reference: Sequence[str], heard: Sequence[str]) -> int:
    """Levenshtein distance in words."""
    row = list(range(len(heard) + 1))
    for i, expected in enumerate(reference, 1):
        previous, row[0] = row[0], i
        for j, word in enumerate(heard, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (expected != word))
    return row[-1]


def word_error_rate(references: Sequence[str], heard: Sequence[str], language: str = "en") -> float:
    """Errors over reference words of a whole set, in percent."""
    pairs = [(words(r, language), words(h, language)) for r, h in zip(references, heard, strict=True)]
    return 100 * sum(word_errors(r, h) for r, h in pairs) / max(1, sum(len(r) for r, _ in pairs))


@dataclass(frozen=True)
class Prosody:
    """What an emotion, style or speed edit moves: F0 median (Hz) and range (semitones between a tenth from below and
    from above, so that a few octaves heard wrong do not count), level (dB), and the duration of the speech for its
    rate."""

    f0_hz: float
    f0_range: float
    level_db: float
    voiced_share: float
    duration_s: float


class Judges:
    """All judges behind one object. `whisper` is the folder of the CTranslate2 Whisper-base."""

    def __init__(self, whisper: Path, threads: int = 2) -> None:
        self._whisper_folder, self._threads = whisper, threads

    @cached_property
    def _whisper(self) -> Any:
        from faster_whisper import WhisperModel

        return WhisperModel(
            str(self._whisper_folder),
            device="cpu",
            compute_type="int8",
            cpu_threads=self._threads,
            local_files_only=True,
        )

    @cached_property
    def _sphinx(self) -> Any:
        from pocketsphinx import Decoder

        return Decoder(loglevel="FATAL")

    @cached_property
    def _voice(self) -> Any:
        from resemblyzer import VoiceEncoder

        return VoiceEncoder("cpu", verbose=False)

    @cached_property
    def _mos(self) -> Any:
        stub_torchaudio()
        from distillmos import ConvTransformerSQAModel

        return ConvTransformerSQAModel().eval()

    @cached_property
    def _f0(self) -> F0Tracker:
        return F0Tracker()

    def hear(self, audio: np.ndarray, language: str = "en") -> str:
        """Whisper-base's transcript, greedy."""
        prompt = "以下是普通话的句子。" if language == "zh" else None
        segments, _ = self._whisper.transcribe(
            audio, language=language, beam_size=1, without_timestamps=True, initial_prompt=prompt
        )
        return " ".join(segment.text for segment in segments)

    def hear_again(self, audio: np.ndarray) -> str:
        """Pocketsphinx's transcript: a second, weaker recogniser of another make. English only."""
        self._sphinx.start_utt()
        self._sphinx.process_raw((np.clip(audio, -1, 1) * 32000).astype(np.int16).tobytes(), full_utt=True)
        self._sphinx.end_utt()
        hypothesis = self._sphinx.hyp()
        return hypothesis.hypstr if hypothesis else ""

    def voice(self, audio: np.ndarray) -> np.ndarray:
        """Resemblyzer's speaker embedding, unit length (256,)."""
        from resemblyzer import preprocess_wav

        return np.asarray(self._voice.embed_utterance(preprocess_wav(audio, 16_000)))

    def naturalness(self, audio: np.ndarray) -> float:
        """DistillMOS, 1 to 5, at a peak of 0.8."""
        with torch.inference_mode():
            return float(self._mos(torch.from_numpy(_to_peak(audio))[None]))

    def background(self, audio: np.ndarray) -> float:
        """DNSMOS P.835 background score, 1 to 5 (5: no noise)."""
        from speechmos import dnsmos

        return float(dnsmos.run(_to_peak(audio), 16_000)["bak_mos"])

    def prosody(self, audio: np.ndarray) -> Prosody:
        """F0 by FCPE, level of the loud half of the frames; silence at both ends is left out."""
        audio = without_ends(audio)
        f0 = self._f0(audio)
        voiced = f0[f0 > 0]
        frames = audio[: len(audio) // 320 * 320].reshape(-1, 320)
        power = np.sort((frames**2).mean(1))[len(frames) // 2 :] if len(frames) else np.zeros(1)
        low, middle, high = np.percentile(voiced, [10, 50, 90]) if len(voiced) else (0.0, 0.0, 0.0)
        return Prosody(
            f0_hz=float(middle),
            f0_range=float(12 * np.log2(high / low)) if len(voiced) > 1 else 0.0,
            level_db=float(10 * np.log10(power.mean() + 1e-9)),
            voiced_share=len(voiced) / max(1, len(f0)),
            duration_s=len(audio) / 16_000,
        )


def frame_levels(audio_16k: np.ndarray) -> np.ndarray:
    """Level of each 20 ms frame, dB."""
    frames = audio_16k[: len(audio_16k) // 320 * 320].reshape(-1, 320)
    return np.asarray(10 * np.log10((frames**2).mean(1) + 1e-10))


def without_ends(audio: np.ndarray, floor_db: float = -40.0) -> np.ndarray:
    """From the first to the last 20 ms frame within `floor_db` of the loudest, 16 kHz."""
    level = frame_levels(audio)
    loud = np.flatnonzero(level > level.max() + floor_db) if len(level) else level
    return audio[loud[0] * 320 : (loud[-1] + 1) * 320] if len(loud) else audio


def _to_peak(audio: np.ndarray) -> np.ndarray:
    return (audio / max(1e-3, float(np.abs(audio).max())) * 0.8).astype(np.float32)


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two speaker embeddings."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
