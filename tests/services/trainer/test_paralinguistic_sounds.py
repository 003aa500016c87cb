"""Made breaths, sighs, hesitations and laughs: where they lie in spectrum and sentence, and what is not made."""

from __future__ import annotations

import numpy as np
import pytest

from services.trainer.data import build
from services.trainer.data.manifest import Refused
from services.trainer.data.paralinguistic_sounds import (
    LAUGH_TEMPO,
    LEVEL_DB,
    SHAPES,
    SYLLABLES,
    TAGS,
    breath_sound,
    tagged_text,
    with_sound,
)
from shared.audio.io import Waveform
from shared.errors import UserError
from shared.tags import check_text_tags
from tests.services.trainer.test_data import RATE, tokenize, tone

WORDS = ["well", "then", "we", "go"]


def centroid(audio: np.ndarray) -> float:
    power = np.abs(np.fft.rfft(audio)) ** 2
    return float((np.fft.rfftfreq(len(audio), 1 / RATE) * power).sum() / power.sum())


@pytest.mark.parametrize("tag", SHAPES)
def test_a_sound_is_noise_in_its_bands_with_silent_ends(tag: str) -> None:
    sound = breath_sound(tag, RATE, np.random.default_rng(0))
    assert SHAPES[tag].shortest_s <= len(sound) / RATE <= SHAPES[tag].longest_s
    assert np.abs(sound).max() == pytest.approx(1)
    assert max(abs(sound[0]), abs(sound[-1])) < 1e-3
    assert 500 < centroid(sound) < 3500
    np.testing.assert_array_equal(sound, breath_sound(tag, RATE, np.random.default_rng(0)))


def test_a_breath_swells_and_a_sigh_falls_and_darkens() -> None:
    for tag, later_is_louder in (("Breathing", True), ("Sigh", False)):
        halves = np.array_split(breath_sound(tag, RATE, np.random.default_rng(1)), 2)
        assert (np.std(halves[1]) > np.std(halves[0])) == later_is_louder
    sigh = np.array_split(breath_sound("Sigh", RATE, np.random.default_rng(2)), 3)
    assert centroid(sigh[2]) < centroid(sigh[0])


@pytest.mark.parametrize("tag", TAGS)
def test_a_sound_lies_between_two_phrases_at_its_loudness(tag: str) -> None:
    said: list[str] = []

    def say(text: str, manner: str) -> Waveform:
        assert manner == ("emotion/excited" if text.startswith("Ha") else "neutral")
        said.append(text)
        return Waveform(tone(0.3), RATE)

    made = with_sound(WORDS, tag, 2, "en", say, np.random.default_rng(0))
    assert said == ["well then", "we go", *([SYLLABLES[tag]["en"]] if tag in SYLLABLES else [])]
    assert made.duration_s > 0.6 + (SHAPES[tag].shortest_s if tag in SHAPES else 0.3 / LAUGH_TEMPO)
    if tag == "Laughter":
        laugh = made.samples[round(0.38 * RATE) : len(made.samples) - round(0.38 * RATE)]
        assert np.std(laugh[-len(laugh) // 4 :]) < 0.5 * np.std(laugh[: len(laugh) // 4])
    if tag in LEVEL_DB:
        start, speech = round(0.38 * RATE), np.sqrt(np.mean(tone(0.3) ** 2))
        between = made.samples[start : len(made.samples) - start]
        level = 20 * np.log10(np.sqrt(np.mean(between**2)) / speech)
        assert level == pytest.approx(LEVEL_DB[tag], abs=2)
    text = tagged_text(WORDS, tag, 2, "en")
    assert text == f"well then [{tag}] we go"
    check_text_tags(text)


def test_what_cannot_be_made_honestly_is_refused() -> None:
    with pytest.raises(UserError, match="No sound is made for the tag"):
        breath_sound("Cough", RATE, np.random.default_rng(0))
    for words, at, language, tag in ((WORDS, 0, "en", "Sigh"), (WORDS, 4, "en", "Sigh"), (WORDS, 1, "fr", "Uhm")):
        with pytest.raises(UserError):
            with_sound(words, tag, at, language, lambda *_: Waveform(tone(0.2), RATE), np.random.default_rng(0))


def test_sentences_become_quadruplets_with_the_teachers_voice() -> None:
    class Voice:
        name, licence = "voice", "CC0-1.0"

        def say(self, text: str, language: str, speaker: str, manner: str) -> Waveform:
            return Waveform(tone(0.1 * (1 + len(text.split()))), RATE)

    sentences = [build.Sentence("well then we go", "en"), build.Sentence("no", "en")]
    rows = list(build.made_sounds(Voice(), sentences, {"en": ["ann"]}, tokenize, count=12, seed=1))
    good = [row for row in rows if not isinstance(row, Refused)]
    assert {row.edit.target_text.split("[")[1].split("]")[0] for row in good} == set(TAGS)
    for row in good:
        assert row.source.text == "well then we go"
        assert build.without_tags(row.target.text) == row.source.text
        assert row.origin == "voice+made-sounds"
    assert len(good) < len(rows)
    assert "one word" in next(row.reason for row in rows if isinstance(row, Refused))
