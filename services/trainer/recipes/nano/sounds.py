"""The teacher's readings with a sound put between two words, as codes and mels: what paralinguistic edits lead to.

Breaths and sighs are made, "um" and laughter are syllables that the teacher says in the reading's voice
(`services.trainer.data.paralinguistic_sounds`). English readings, each with one sound. `python -m
services.trainer.recipes.nano.sounds`, after `features`; files that are there are left, and several processes share the
work by `--part k/n`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import soxr
import torch

from services.trainer.data.paralinguistic_sounds import TAGS, Say, sound, tagged_text
from services.trainer.recipes.nano import alignment, assets, corpus, teacher
from services.trainer.recipes.nano.codes import Item, load_items, open_tokenizers, save_items
from services.trainer.recipes.nano.features import Store
from shared.audio.features import prompt_mel
from shared.audio.io import Waveform

SOUND = -1
"""Stands for a sound among the phonemes of a row."""
RATE_HZ = teacher.SAMPLE_RATE_HZ
SEARCH_S, FADE_S = 0.05, 0.005


def items() -> Iterator[Item]:
    """What was written so far, each with "speaker" and "mel". A row's index is that of the reading, "at_s" and
    "put_in_s" say where and how much."""
    for file in sorted((assets.data_dir() / "sounds").glob("shard-?????.npz")):
        yield from load_items(file)


def with_sound(
    row: dict[str, Any], audio: np.ndarray, between: np.ndarray, tag: str, word: int
) -> tuple[dict[str, Any], np.ndarray]:
    """The reading's record and audio (n,) with what was made put in before a word, where it is quietest.

    The text has the tag, the phonemes have SOUND, and the frames its share of the new duration.
    """
    spoken = alignment.words(row)
    assert spoken is not None, "a row whose words are not known has no place for a sound"
    first = int(spoken[word, 0])
    begin_s = float(alignment.boundaries(row)[first])
    cut = _quietest(audio, begin_s)
    fade = np.linspace(0.0, 1.0, round(FADE_S * RATE_HZ), dtype=np.float32)
    before, after = audio[:cut].copy(), audio[cut:].copy()
    before[-len(fade) :] *= fade[::-1][-len(before) :]
    after[: len(fade)] *= fade[: len(after)]
    put_in_s = len(between) / RATE_HZ
    frames, phonemes = list(row["frames"]), list(row["phonemes"])
    frames[first + 1 : first + 1] = [put_in_s * sum(frames) / row["duration_s"], 0]
    phonemes[first:first] = [SOUND, alignment.SPACE]
    record = row | {
        "text": tagged_text(row["text"].split(), tag, word, row["language"]),
        "duration_s": round(row["duration_s"] + put_in_s, 4),
        "phonemes": phonemes,
        "frames": frames,
        "tag": tag,
        "at_s": cut / RATE_HZ,
        "put_in_s": put_in_s,
    }
    return record, np.concatenate([before, between, after])


def _quietest(audio: np.ndarray, near_s: float) -> int:
    """The quietest sample near a time, by 10 ms of level."""
    window = np.ones(RATE_HZ // 100) / (RATE_HZ // 100)
    level = np.convolve(audio.astype(np.float64) ** 2, window, mode="same")
    low = max(1, round((near_s - SEARCH_S) * RATE_HZ))
    high = min(len(audio) - 1, round((near_s + SEARCH_S) * RATE_HZ))
    return low + int(level[low:high].argmin()) if low < high else min(low, len(audio) - 1)


class Voices:
    """Says the syllables of sounds in the voices of readings, each once."""

    def __init__(self) -> None:
        self._teacher = teacher.open_teacher(assets.prepare())
        self._phonemes = corpus.Phonemes()
        self._said: dict[tuple[str, str, str], Waveform] = {}

    def of(self, row: dict[str, Any]) -> Say:
        """What says a text in a manner in the voice of a row."""

        def say(text: str, manner: str) -> Waveform:
            key = (row["voice_name"], text, manner)
            if key not in self._said:
                spoken = self._teacher.say(self._phonemes(text, "en"), row["voice"], teacher.MANNERS[manner])
                self._said[key] = Waveform(np.asarray(spoken.audio, np.float32), RATE_HZ)
            return self._said[key]

        return say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", default="0/1", help="this process and how many there are")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", help="encode by its tokenizers, not by those of the runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    part, parts = (int(x) for x in arguments.part.split("/"))
    folder = assets.data_dir() / "sounds"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizers, store, voices = open_tokenizers(arguments.checkpoint, arguments.threads), Store(), Voices()
    position = {row["index"]: i for i, row in enumerate(store.rows)}
    for shard in sorted((assets.data_dir() / "features").glob("shard-?????"))[part::parts]:
        target = folder / f"{shard.name}.npz"
        if target.exists():
            continue
        made: list[Item] = []
        for row in json.loads((shard / "index.json").read_text()):
            spoken = alignment.words(row)
            if row["index"] not in position or row["language"] != "en" or spoken is None or len(spoken) < 3:
                continue
            rng = np.random.default_rng((corpus.SEED, 7, row["index"]))
            tag, word = TAGS[row["index"] % len(TAGS)], int(rng.integers(1, len(spoken)))
            speech = Waveform(store.audio(position[row["index"]]), RATE_HZ)
            between = sound(tag, "en", voices.of(row), speech, rng)
            kept = {key: value for key, value in row.items() if key != "spans"}
            record, audio = with_sound(kept, speech.samples, between, tag, word)
            audio_16k = np.asarray(soxr.resample(audio, RATE_HZ, 16_000), np.float32)
            mel = prompt_mel(torch.from_numpy(audio)).numpy().astype(np.float16)
            made.append(
                {"row": record, "clean": tokenizers(audio_16k), "speaker": tokenizers.voice(audio_16k), "mel": mel}
            )
        save_items(made, target)
        print(f"{target.name}: {len(made)} rows", flush=True)


if __name__ == "__main__":
    main()
