"""Breaths, sighs, hesitations and laughs made without recordings of people, put into speech: quadruplets where no
tagged corpus is near.

A breath and a sigh are noise through the resonances of an open mouth, with the loudness of air that is drawn in or let
go. "Uhm" and laughter are the teacher's own voice reading syllables: a laugh is "ha ha ha ha", excited, hurried and
dying away. All are stand-ins that carry a tag's place and kind. Coughs and cries are gestures that neither noise nor
reading gives, so there are none. Everything follows from a seed. Knows nothing about rows or codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.trainer.data.degrade import change_tempo
from shared.audio.io import Waveform
from shared.errors import UserError

Audio = npt.NDArray[np.float32]
Say = Callable[[str, str], Waveform]
"""A text in the speaker's voice and a manner."""

TAGS = ("Breathing", "Sigh", "Uhm", "Laughter")
SYLLABLES: Mapping[str, Mapping[str, str]] = {
    "Uhm": {"en": "um", "zh": "嗯"},
    "Laughter": {"en": "Ha ha ha ha ha.", "zh": "哈哈哈哈哈"},
}
READ_AS = {"Uhm": "neutral", "Laughter": "emotion/excited"}
LAUGH_TEMPO, LAUGH_FADE_DB = 1.4, -14.0
PAUSE_S = 0.08
LEVEL_DB = {"Breathing": -20.0, "Sigh": -16.0}
"""Loudness of a sound under that of the speech around it."""


@dataclass(frozen=True)
class Shape:
    """A noise burst: its length range, resonances at its begin and end (Hz), where its loudness peaks (0 to 1)."""

    shortest_s: float
    longest_s: float
    begin_hz: tuple[float, ...]
    end_hz: tuple[float, ...]
    peak: float


SHAPES: Mapping[str, Shape] = {
    # Air drawn in: quickly swelling to its end, bright. Air let go: loud at once, falling and darkening.
    "Breathing": Shape(0.30, 0.55, (900.0, 1800.0, 3200.0), (1100.0, 2200.0, 3800.0), 0.7),
    "Sigh": Shape(0.55, 1.00, (800.0, 1500.0, 2700.0), (450.0, 1000.0, 2300.0), 0.15),
}


def breath_sound(tag: str, rate_hz: int, rng: np.random.Generator) -> Audio:
    """The sound of a tag of SHAPES, (n,), peak 1. Raises UserError for another tag."""
    if tag not in SHAPES:
        raise UserError(f"No sound is made for the tag [{tag}].", f"Known: {', '.join(SHAPES)}.", "bad_row")
    shape = SHAPES[tag]
    count = round(float(rng.uniform(shape.shortest_s, shape.longest_s)) * rate_hz)
    place = np.linspace(0.0, 1.0, count)
    noise = rng.standard_normal(count)
    opening, closing = (_resonant(noise, rate_hz, centers) for centers in (shape.begin_hz, shape.end_hz))
    rise, fall = np.minimum(1.0, place / shape.peak), np.minimum(1.0, (1 - place) / (1 - shape.peak))
    envelope = np.sin(np.pi / 2 * rise) ** 2 * np.sin(np.pi / 2 * fall) ** 2
    sound = ((1 - place) * opening + place * closing) * envelope
    return np.asarray(sound / max(1e-9, float(np.abs(sound).max())), np.float32)


def with_sound(words: Sequence[str], tag: str, at: int, language: str, say: Say, rng: np.random.Generator) -> Waveform:
    """The words said with the tag's sound before word `at` (1 to len - 1): two phrases, the sound between them.

    Raises UserError for a place at an edge, an unknown tag, or a language without its syllables.
    """
    if not 1 <= at < len(words):
        raise UserError(f"A sound goes between words: {at} is no place in {len(words)} words.", code="bad_row")
    joiner = "" if language == "zh" else " "
    before, after = (say(joiner.join(part), "neutral") for part in (words[:at], words[at:]))
    rate = before.sample_rate_hz
    between = sound(tag, language, say, Waveform(np.concatenate([before.samples, after.samples]), rate), rng)
    parts = [_trimmed(before.samples), between, _trimmed(after.samples)]
    return Waveform(np.concatenate(parts), rate)


def sound(tag: str, language: str, say: Say, speech: Waveform, rng: np.random.Generator) -> Audio:
    """The sound of a tag between two pauses, (n,) at the rate of the speech around it and as loud as fits that.

    Raises UserError for an unknown tag, or a language without its syllables.
    """
    rate = speech.sample_rate_hz
    if tag in SYLLABLES:
        if language not in SYLLABLES[tag]:
            raise UserError(f"There is no [{tag}] for the language {language!r}.", code="bad_row")
        made = _trimmed(say(SYLLABLES[tag][language], READ_AS[tag]).samples)
        if tag == "Laughter":
            made = _laughed(made, rate)
    else:
        made = breath_sound(tag, rate, rng)
        made = np.asarray(
            made * (_rms(speech.samples) * 10 ** (LEVEL_DB[tag] / 20) / max(1e-9, _rms(made))), np.float32
        )
    return np.pad(made, round(PAUSE_S * rate))


def tagged_text(words: Sequence[str], tag: str, at: int, language: str) -> str:
    """The words with [tag] before word `at`."""
    joiner = "" if language == "zh" else " "
    return f"{joiner.join(words[:at])}{joiner}[{tag}]{joiner}{joiner.join(words[at:])}"


def _resonant(noise: npt.NDArray[np.float64], rate_hz: int, centers: Sequence[float]) -> npt.NDArray[np.float64]:
    """Noise with bands around the centers, each a quarter of its frequency wide and weaker than the one below."""
    spectrum, hertz = np.fft.rfft(noise), np.fft.rfftfreq(len(noise), 1 / rate_hz)
    gain = sum(0.6**number * np.exp(-0.5 * ((hertz - f) / (0.25 * f)) ** 2) for number, f in enumerate(centers))
    return np.asarray(np.fft.irfft(spectrum * gain, len(noise)))


def _laughed(read: Audio, rate_hz: int) -> Audio:
    """Read syllables hurried and dying away."""
    hurried = change_tempo(read, rate_hz, LAUGH_TEMPO)
    return np.asarray(hurried * 10 ** (LAUGH_FADE_DB / 20 * np.linspace(0.0, 1.0, len(hurried))), np.float32)


def _trimmed(audio: Audio) -> Audio:
    """Without what is more than 45 dB under the peak at both ends."""
    loud = np.flatnonzero(np.abs(audio) > float(np.abs(audio).max()) * 10 ** (-45 / 20))
    return audio[loud[0] : loud[-1] + 1] if len(loud) else audio


def _rms(audio: Audio) -> float:
    return float(np.sqrt(np.mean(audio.astype(np.float64) ** 2)))
