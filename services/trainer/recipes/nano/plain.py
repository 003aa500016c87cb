"""Cheap speech for the language model: hours by virtual speakers, straight to codes.

How text becomes speech, and how one reading becomes another, is learned from hours. The same speakers and manners as
in `volume`, other sentences; only codes are kept. Every ninth reading also in noise and with pauses. `python -m
services.trainer.recipes.nano.plain`; several processes share the work by `--part k/n`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import soxr
import torch

from services.trainer.recipes.nano import assets, volume
from services.trainer.recipes.nano.codes import Item, coded, load_items, open_tokenizers, save_items
from services.trainer.recipes.nano.teacher import SAMPLE_RATE_HZ

FIRST_SENTENCE = 1_000_000
SENTENCES_PER_SHARD = 150
VARIED_EVERY = 9


def items() -> Iterator[Item]:
    """What was written so far."""
    for file in sorted((assets.data_dir() / "plain").glob("shard-?????.npz")):
        yield from load_items(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=16.0, help="of all parts together")
    parser.add_argument("--part", default="0/1", help="this process and how many there are")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", help="encode by its tokenizers, not by those of the runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    part, parts = (int(x) for x in arguments.part.split("/"))
    found, folder = assets.prepare(), assets.data_dir() / "plain"
    folder.mkdir(parents=True, exist_ok=True)
    source, tokenizers = volume.open_source_filter(), open_tokenizers(arguments.checkpoint, arguments.threads)
    hours, shard = 0.0, part
    while hours < arguments.hours / parts:
        target = folder / f"shard-{shard:05d}.npz"
        if not target.exists():
            first = FIRST_SENTENCE + shard * SENTENCES_PER_SHARD
            sentences = volume.plan(found, first, others=2, every=2)
            made: list[Item] = []
            for _ in range(SENTENCES_PER_SHARD):
                sentence = next(sentences)
                for place, reading in enumerate(volume.readings(source, sentence)):
                    audio = np.asarray(soxr.resample(reading.audio, SAMPLE_RATE_HZ, 16_000), np.float32)
                    varied = (sentence.number + place) % VARIED_EVERY == 0
                    made.append(coded(volume.row(sentence, place, reading), audio, tokenizers, sentence.number, varied))
            save_items(made, target)
        hours += sum(item["row"]["duration_s"] for item in load_items(target)) / 3600
        shard += parts
        print(f"{target.name}: {hours:.2f} h", flush=True)


if __name__ == "__main__":
    main()
