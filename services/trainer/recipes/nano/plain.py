"""Cheap speech for the language model: one voice at a hundred times real time, moved to eight speakers, straight to
codes.

How text becomes speech is learned from hours, not from voices. hibari (Apache-2.0, distilled from one voice of the
teacher) reads sentences at several rates, its formants are moved, and only the codes are kept. `python -m
services.trainer.recipes.nano.plain`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch

from services.trainer.recipes.nano import assets, teacher, texts
from services.trainer.recipes.nano.codes import Tokenizers
from services.trainer.recipes.nano.run import pick_device

SEED = 20251104
FORMANTS = (0.84, 0.89, 0.94, 1.0, 1.05, 1.1, 1.15, 1.2)
MANNERS = ("neutral", *(f"speed/{name}" for name in teacher.SPEEDS))
SHARD_ROWS = 400
FIRST_GROUP = 10_000_000
"""Groups are numbered from here, apart from the corpus's."""


def plan(found: assets.Assets) -> Iterator[dict[str, Any]]:
    """Rows without end; every third sentence is read at a second rate too."""
    sentences = [s for s in texts.english(found.wordnet) if not s.held_out]
    number = 0
    while True:
        rng = np.random.default_rng((SEED, number))
        formant = float(rng.choice(FORMANTS))
        text = texts.utterance(sentences, rng).text
        manners = ["neutral"] + ([str(rng.choice(MANNERS[1:]))] if number % 3 == 0 else [])
        for manner in manners:
            yield {
                "group": FIRST_GROUP + number, "text": text, "voice_name": f"heart-{formant}", "manner": manner,
                "formant": formant,
            }  # fmt: skip
        number += 1


def write_shard(rows: list[dict[str, Any]], speak: Any, tokenizers: Tokenizers, target: Path) -> float:
    """Codes of the rows as one .npz with its index as JSON; returns hours of audio."""
    linguistic, semantic, seconds = [], [], 0.0
    for row in rows:
        rate = teacher.MANNERS[row["manner"]].speed / row["formant"]
        audio = np.asarray(soxr.resample(speak(row["text"], rate, 0), 24_000 * row["formant"], 16_000), np.float32)
        codes = tokenizers(audio)
        linguistic.append(codes[0])
        semantic.append(codes[1])
        seconds += len(audio) / 16_000
    lengths = np.array([(len(a), len(b)) for a, b in zip(linguistic, semantic, strict=True)])
    partial = target.with_suffix(".partial.npz")
    np.savez(
        partial, allow_pickle=False, linguistic=np.concatenate(linguistic), semantic=np.concatenate(semantic),
        lengths=lengths, rows=np.frombuffer(json.dumps(rows).encode(), np.uint8),
    )  # fmt: skip
    partial.rename(target)
    return seconds / 3600


def items() -> Iterator[dict[str, Any]]:
    """The rows written so far with their codes, in the form of `codes.Coded`, clean only."""
    for file in sorted((assets.data_dir() / "plain").glob("shard-?????.npz")):
        data = dict(np.load(file))
        ends = np.cumsum(data["lengths"], axis=0)
        for row, end, length in zip(json.loads(data["rows"].tobytes()), ends, data["lengths"], strict=True):
            pair = (data[kind][end[c] - length[c] : end[c]] for c, kind in enumerate(("linguistic", "semantic")))
            yield {"row": row, "clean": tuple(part.astype(np.int32) for part in pair)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    from hibari import Hibari

    found, folder = assets.prepare(), assets.data_dir() / "plain"
    folder.mkdir(parents=True, exist_ok=True)
    speak, tokenizers, rows = Hibari(), Tokenizers(pick_device()), plan(found)
    hours, number = 0.0, 0
    while hours < arguments.hours:
        block = [next(rows) for _ in range(SHARD_ROWS)]
        target = folder / f"shard-{number:05d}.npz"
        if target.exists():
            hours += float(np.load(target)["lengths"][:, 1].sum()) / 25 / 3600
        else:
            hours += write_shard(block, speak, tokenizers, target)
            print(f"{target.name}: {hours:.2f} h", flush=True)
        number += 1


if __name__ == "__main__":
    main()
