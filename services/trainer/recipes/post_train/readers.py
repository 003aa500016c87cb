"""Who reads the recordings of a post-training: the recipes' teacher (good, slow) and the cheap one (a hundred times
real time). A reading has a manner and a strength, so that some readings are weak, as a cloning system's are.

Both follow from their seeds. Knows nothing about codes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from services.trainer.data.teachers import RecipeTeacher, missing_package
from shared.audio.io import Waveform
from shared.errors import UserError


class Reader(Protocol):
    """A source of readings. Called from several threads."""

    name: str
    licence: str
    speakers: Mapping[str, Sequence[str]]
    held_out: Mapping[str, Sequence[str]]
    """Speakers by language: for training, and for the benchmark alone."""

    def say(self, text: str, language: str, speaker: str, manner: str, strength: float, seed: int) -> Waveform:
        """The text in a manner ("neutral", "emotion/happy") of a strength (1 as the manner is). Raises UserError."""
        ...


class Teacher:
    """Kokoro with controls. Its held-out voices are those that the small checkpoint never heard, and two Mandarin ones
    that this training does not hear.
    """

    name, licence = RecipeTeacher.name, RecipeTeacher.licence
    speakers: Mapping[str, Sequence[str]]
    held_out: Mapping[str, Sequence[str]]

    def __init__(self) -> None:
        """Fetches the teacher's packages on first use. Raises MissingComponent without the train extra."""
        self._teacher = RecipeTeacher()
        from services.trainer.recipes.nano import corpus

        mandarin = ("zf_xiaoni", "zm_yunyang")
        self.held_out = {"en": corpus.HELD_OUT_VOICES, "zh": mandarin}
        self.speakers = {
            "en": [*corpus.ENGLISH_VOICES, *corpus.mixed_voices()],
            "zh": [voice for voice in corpus.MANDARIN_VOICES if voice not in mandarin],
        }

    def say(self, text: str, language: str, speaker: str, manner: str, strength: float, seed: int) -> Waveform:
        spoken = self._teacher.say(text, language, speaker, manner, strength)
        return _bounded(spoken.samples, spoken.sample_rate_hz)


class CheapTeacher:
    """One distilled voice moved into `count` virtual speakers. English, no held-out speakers."""

    name, licence = "hibari-source-filter", "Apache-2.0"
    speakers: Mapping[str, Sequence[str]]
    held_out: Mapping[str, Sequence[str]]

    def __init__(self, count: int = 150) -> None:
        """Fetches the voice's package on first use. Raises MissingComponent without the train extra."""
        try:
            from services.trainer.recipes.nano import assets, teacher, volume

            assets.prepare()
            self._source, self._speaker = volume.open_source_filter(), volume.speaker
        except ModuleNotFoundError as error:
            raise missing_package(error) from error
        self._manners, self._blend, self._rate_hz = teacher.MANNERS, teacher.blend, teacher.SAMPLE_RATE_HZ
        self._numbers = {f"virtual{number:03d}": number for number in range(count)}
        self.speakers, self.held_out = {"en": list(self._numbers)}, {}
        self._lock = threading.Lock()

    def say(self, text: str, language: str, speaker: str, manner: str, strength: float, seed: int) -> Waveform:
        if language != "en":
            raise UserError(f"The cheap teacher does not speak {language!r}.", code="bad_row")
        with self._lock:
            phonemes = self._source.phonemes(text)
        rng = np.random.default_rng(seed)
        made = self._source.say(
            phonemes, self._speaker(self._numbers[speaker]), self._blend(self._manners[manner], strength), rng
        )
        return _bounded(made.audio, self._rate_hz)


def _bounded(audio: np.ndarray, rate_hz: int) -> Waveform:
    """Peaks of at most 0.95."""
    peak = max(0.95, float(np.abs(audio).max(initial=0.0)))
    return Waveform(np.asarray(audio * (0.95 / peak), np.float32), rate_hz)
