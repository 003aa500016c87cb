"""Volume for the corpus: hours of cheap speech by virtual speakers, with phonemes and F0, beside the teacher's rows.

`python -m services.trainer.recipes.nano.volume --hours 3` appends rows to the corpus folder in the corpus's own
form; the plan is a function of the seed, and a killed run continues. The rows number from 20 million.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import soundfile

from services.trainer.recipes.nano import assets, teacher, texts
from services.trainer.recipes.nano.features import save_pitch
from services.trainer.recipes.nano.source_filter import FRAME_S, Reading, SourceFilter, Speaker
from services.trainer.recipes.nano.teacher import SAMPLE_RATE_HZ

SEED = 20251104
SPEAKERS = 600
FIRST_INDEX = 20_000_000
MANNERS = [name for name in teacher.MANNERS if name != "neutral"]
SHARD_ROWS = 500


@dataclass(frozen=True)
class Sentence:
    """A text to be read by one speaker in several manners, "neutral" first."""

    number: int
    text: str
    speaker: int
    manners: tuple[str, ...]


def speaker(number: int) -> Speaker:
    """Virtual speaker `number`, the same everywhere."""
    return Speaker.drawn(np.random.default_rng((SEED, 1, number)))


def plan(found: assets.Assets, first: int, *, others: int, every: int) -> Iterator[Sentence]:
    """Sentences without end from number `first`; every `every`-th is read in `others` manners beside the neutral."""
    sentences = [s for s in texts.english(found.wordnet) if not s.held_out]
    number = first
    while True:
        rng = np.random.default_rng((SEED, 0, number))
        text = texts.utterance(sentences, rng).text
        manners: tuple[str, ...] = ("neutral",)
        if number % every == 0:
            manners += tuple(str(m) for m in rng.choice(MANNERS, others, replace=False))
        yield Sentence(number, text, int(rng.integers(SPEAKERS)), manners)
        number += 1


def open_source_filter() -> SourceFilter:
    """The cheap teacher, its graph kept with the other assets."""
    return SourceFilter(assets.data_dir() / "assets" / "hibari-durations.onnx")


def row(sentence: Sentence, place: int, reading: Reading) -> dict[str, object]:
    """The manifest's record of one reading, without its index."""
    name = f"virtual{sentence.speaker:03d}"
    return {
        "group": FIRST_INDEX + sentence.number, "text": sentence.text, "language": "en", "voice": {name: 1.0},
        "voice_name": name, "manner": sentence.manners[place], "held_out": False,
        "duration_s": round(len(reading.audio) / SAMPLE_RATE_HZ, 4), "phonemes": reading.phoneme_ids,
        "frames": reading.frames,
    }  # fmt: skip


def readings(source: SourceFilter, sentence: Sentence) -> Iterator[Reading]:
    """The sentence in each of its manners, peaks kept below one."""
    phonemes = source.phonemes(sentence.text)
    for place, manner in enumerate(sentence.manners):
        rng = np.random.default_rng((SEED, 2, sentence.number, place))
        made = source.say(phonemes, speaker(sentence.speaker), teacher.MANNERS[manner], rng)
        peak = max(0.95, float(np.abs(made.audio).max()))
        yield Reading(made.audio * (0.95 / peak), made.phoneme_ids, made.frames, made.f0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=3.0)
    arguments = parser.parse_args()
    found, folder = assets.prepare(), assets.data_dir() / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    source, sentences = open_source_filter(), plan(found, 0, others=2, every=2)
    hours, shard, index = 0.0, 0, FIRST_INDEX
    while hours < arguments.hours:
        manifest = folder / f"manifest-volume-{shard:03d}.jsonl"
        records: list[dict[str, object]] = []
        pitch: list[np.ndarray] = []
        while len(records) < SHARD_ROWS:
            sentence = next(sentences)
            if manifest.exists():  # the plan alone tells how many rows the sentence has
                records += [{}] * len(sentence.manners)
                continue
            for place, made in enumerate(readings(source, sentence)):
                number = index + len(records)
                soundfile.write(folder / f"{number:07d}.flac", made.audio, SAMPLE_RATE_HZ, subtype="PCM_16")
                records.append({"index": number} | row(sentence, place, made))
                at = np.minimum((np.arange(len(made.audio) // 240) / 100 / FRAME_S).astype(int), len(made.f0) - 1)
                pitch.append(made.f0[at])
        index += len(records)
        if not manifest.exists():
            save_pitch(manifest.with_suffix(".npz"), [record["index"] for record in records], pitch)
            partial = manifest.with_suffix(".partial")
            partial.write_text("".join(json.dumps(record) + "\n" for record in records))
            partial.rename(manifest)
        hours += sum(json.loads(line)["duration_s"] for line in manifest.read_text().splitlines()) / 3600
        shard += 1
        print(f"volume: {hours:.2f} h", flush=True)


if __name__ == "__main__":
    main()
