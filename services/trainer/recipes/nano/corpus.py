"""The corpus of the small checkpoint: which voice says which sentence how, rendered by the teacher, resumable.

The plan is a pure function of the seed: row i is the same on every machine, so several processes share it by
remainder and a killed run continues where it stopped. `python -m services.trainer.recipes.nano.corpus --workers 2
--hours 3`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile

from services.trainer.recipes.nano import assets, teacher, texts

SEED = 20251103
HELD_OUT_VOICES = ("af_kore", "am_michael", "bf_lily", "bm_george")
"""Never mixed, never trained on: the unseen voices of the benchmark."""
ENGLISH_VOICES = (
    "af_alloy",
    "af_aoede",
    "af_bella",
    "af_heart",
    "af_jessica",
    "af_nova",
    "af_river",
    "af_sarah",
    "af_sky",
    "am_adam",
    "am_echo",
    "am_eric",
    "am_fenrir",
    "am_liam",
    "am_onyx",
    "am_puck",
    "am_santa",
    "bf_alice",
    "bf_emma",
    "bf_isabella",
    "bm_daniel",
    "bm_fable",
    "bm_lewis",
    "af_nicole",
)
MANDARIN_VOICES = ("zf_xiaobei", "zf_xiaoxiao", "zf_xiaoyi", "zm_yunjian", "zm_yunxi", "zm_yunxia", "zm_yunyang")
MIXES = 240
GROUP_MANNERS = 3


@dataclass(frozen=True)
class Row:
    """One utterance to render. Rows of one `group` share voice and text: the pairs that edits learn from."""

    index: int
    group: int
    text: str
    language: str
    voice: dict[str, float]
    voice_name: str
    manner: str
    held_out: bool


def mixed_voices(seed: int = SEED) -> dict[str, dict[str, float]]:
    """Speakers of three voices each, weights from Dirichlet(0.7); same-gender parts more often than not."""
    rng = np.random.default_rng(seed)
    mixes = {}
    for number in range(MIXES):
        pool = [v for v in ENGLISH_VOICES if rng.random() < 0.2 or v[1] == ("f" if number % 2 else "m")]
        chosen = rng.choice(pool, 3, replace=False)
        weights = rng.dirichlet([0.7] * 3)
        mixes[f"mix{number:03d}"] = {str(name): round(float(w), 4) for name, w in zip(chosen, weights, strict=True)}
    return mixes


def plan(found: assets.Assets, seed: int = SEED) -> Iterator[Row]:
    """Rows without end: half neutral single utterances, half groups of one sentence in several manners; every
    seventh Mandarin."""
    english, mandarin = texts.english(found.wordnet), texts.mandarin(found.hsk)
    mixes = list(mixed_voices(seed).items())
    manners = [name for name in teacher.MANNERS if name != "neutral"]
    index = group = 0
    while True:
        rng = np.random.default_rng((seed, group))
        chinese = group % 7 == 3
        sentence = texts.utterance(mandarin if chinese else english, rng)
        if chinese:
            name = str(rng.choice(MANDARIN_VOICES))
            voice = {name: 1.0}
        elif sentence.held_out and rng.random() < 0.5:
            name = str(rng.choice(HELD_OUT_VOICES))
            voice = {name: 1.0}
        elif rng.random() < 0.4:
            name = str(rng.choice(ENGLISH_VOICES))
            voice = {name: 1.0}
        else:
            name, voice = mixes[int(rng.integers(len(mixes)))]
        chosen = ["neutral"]
        if group % 2:
            chosen += [str(m) for m in rng.choice(manners, GROUP_MANNERS, replace=False)]
        held_out = sentence.held_out or name in HELD_OUT_VOICES
        for manner in chosen:
            yield Row(index, group, sentence.text, sentence.language, voice, name, manner, held_out)
            index += 1
        group += 1


class Phonemes:
    """Text to the teacher's phoneme symbols, English and Mandarin."""

    def __init__(self) -> None:
        from hibari import Hibari
        from misaki.zh import ZHG2P

        self._english, self._mandarin = Hibari(), ZHG2P()

    def __call__(self, text: str, language: str) -> str:
        if language == "zh":
            symbols = self._mandarin(text)
            return str(symbols[0] if isinstance(symbols, tuple) else symbols)
        return " ".join(self._english.phonemize(text))


def render(worker: int, workers: int, folder: Path, hours: float, first_group: int) -> None:
    """Render this worker's rows from `first_group` on until the worker's share of the hours is done; rows already in
    its manifest are skipped."""
    found = assets.prepare()
    speaker = teacher.open_teacher(found)
    phonemes = Phonemes()
    manifest = folder / f"manifest-{worker}-of-{workers}.jsonl"
    done = [json.loads(line) for line in manifest.read_text().splitlines()] if manifest.exists() else []
    seconds, last = sum(row["duration_s"] for row in done), max((row["index"] for row in done), default=-1)
    with manifest.open("a") as out:
        for row in plan(found):
            if seconds >= hours * 3600 / workers:
                return
            if row.index <= last or row.group < first_group or row.group % workers != worker:
                continue
            try:
                spoken = speaker.say(phonemes(row.text, row.language), row.voice, teacher.MANNERS[row.manner])
            except ValueError as problem:
                print(f"row {row.index} left out: {problem}", flush=True)
                continue
            soundfile.write(
                folder / f"{row.index:07d}.flac", np.clip(spoken.audio, -1, 1), teacher.SAMPLE_RATE_HZ, subtype="PCM_16"
            )
            duration_s = len(spoken.audio) / teacher.SAMPLE_RATE_HZ
            record = asdict(row) | {
                "duration_s": round(duration_s, 4),
                "phonemes": spoken.phoneme_ids,
                "frames": spoken.frames,
            }
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
            out.flush()
            seconds += duration_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--hours", type=float, default=3.0)
    parser.add_argument(
        "--first-group", type=int, default=0, help="start here: sentences that the released weights have not seen"
    )
    arguments = parser.parse_args()
    folder = assets.data_dir() / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    assets.prepare()
    processes = [
        multiprocessing.get_context("spawn").Process(
            target=render, args=(worker, arguments.workers, folder, arguments.hours, arguments.first_group)
        )
        for worker in range(arguments.workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
