"""The teacher's readings played faster and slower, as codes: more speakers for the language model and the flow.

An hour of the teacher costs 25 core-minutes, and a language model that hears its few hours often learns them by heart.
Played at another speed a reading has another pitch, other formants and another pace, so other codes for the same words
(speed perturbation, Ko et al., Interspeech 2015). A voice at one speed is a voice of its own; readings of a group keep
their relations, so edits hold. `python -m services.trainer.recipes.nano.perturbed`, after `features`; files that are
there are left, and several processes share the work by `--part k/n`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import soxr
import torch

from services.trainer.recipes.nano import assets
from services.trainer.recipes.nano.codes import VARIED_EVERY, Item, coded, load_items, open_tokenizers, save_items
from services.trainer.recipes.nano.features import Store
from services.trainer.recipes.nano.teacher import SAMPLE_RATE_HZ

SPEEDS = (0.88, 0.94, 1.06, 1.12)
FIRST_GROUP = 1_000_000
"""Of the first speed's groups; every speed has as many numbers."""


def items() -> Iterator[Item]:
    """What was written so far, each with "speaker"; its row says the "speed" of the store's row of that index."""
    for file in sorted((assets.data_dir() / "perturbed").glob("shard-?????-?.npz")):
        yield from load_items(file)


def at_speed(row: dict[str, Any], place: int) -> dict[str, Any]:
    """The manifest's record of a reading at SPEEDS[place]; its phonemes' frames stay, as shares of the duration."""
    return row | {
        "group": row["group"] + (place + 1) * FIRST_GROUP,
        "voice_name": f"{row['voice_name']}@{SPEEDS[place]}",
        "duration_s": round(row["duration_s"] / SPEEDS[place], 4),
        "speed": SPEEDS[place],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", default="0/1", help="this process and how many there are")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", help="encode by its tokenizers, not by those of the runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    part, parts = (int(x) for x in arguments.part.split("/"))
    folder = assets.data_dir() / "perturbed"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizers, store = open_tokenizers(arguments.checkpoint, arguments.threads), Store(keep="train")
    position = {row["index"]: i for i, row in enumerate(store.rows)}
    shards = sorted((assets.data_dir() / "features").glob("shard-?????"))
    tasks = [(shard, place) for shard in shards for place in range(len(SPEEDS))]
    for shard, place in tasks[part::parts]:
        target = folder / f"{shard.name}-{place}.npz"
        if target.exists():
            continue
        made: list[Item] = []
        for row in json.loads((shard / "index.json").read_text()):
            if row["index"] in position:
                audio = store.audio(position[row["index"]])
                faster = np.asarray(soxr.resample(audio, SAMPLE_RATE_HZ * SPEEDS[place], 16_000), np.float32)
                kept = {key: value for key, value in row.items() if key != "spans"}
                varied = (row["index"] + place) % VARIED_EVERY == 0
                item = coded(at_speed(kept, place), faster, tokenizers, row["index"], varied)
                made.append(item | {"speaker": tokenizers.voice(faster)})
        save_items(made, target)
        print(f"{target.name}: {len(made)} rows", flush=True)


if __name__ == "__main__":
    main()
