"""Mels of the cheap readings, for the flow: hours at a hundredth of the teacher's price.

`python -m services.trainer.recipes.nano.mels --hours 10` says the sentences of `plain` again, which has their codes,
and keeps mel and speaker vector of each shard. Needs `plain`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import soxr
import torch

from services.trainer.recipes.nano import assets, volume
from services.trainer.recipes.nano.codes import Item, load_items, open_tokenizers
from services.trainer.recipes.nano.plain import FIRST_SENTENCE, SENTENCES_PER_SHARD
from services.trainer.recipes.nano.source_filter import SourceFilter
from services.trainer.recipes.nano.teacher import SAMPLE_RATE_HZ
from shared.audio.features import prompt_mel


def items() -> Iterator[Item]:
    """The readings that have a mel: those of `plain` with "mel" (frames, 80) float16 and "speaker" (192,)."""
    for file in sorted((assets.data_dir() / "mels").glob("shard-?????.npz")):
        data = dict(np.load(file))
        mels = np.split(data["mel"], np.cumsum(data["lengths"])[:-1])
        shard = load_items(assets.data_dir() / "plain" / file.name)
        for item, mel, speaker in zip(shard, mels, data["speaker"], strict=True):
            yield item | {"mel": mel, "speaker": speaker}


def write(shard: Path, target: Path, source: SourceFilter, voice: Callable[[np.ndarray], np.ndarray]) -> float:
    """Say a shard's sentences again; returns its hours."""
    sentences = volume.plan(
        assets.prepare(), FIRST_SENTENCE + int(shard.stem[-5:]) * SENTENCES_PER_SHARD, others=2, every=2
    )
    mels, speakers = [], []
    for sentence in islice(sentences, SENTENCES_PER_SHARD):
        for reading in volume.readings(source, sentence):
            audio = reading.audio.astype(np.float32)
            mels.append(prompt_mel(torch.from_numpy(audio)).numpy().astype(np.float16))
            speakers.append(voice(np.asarray(soxr.resample(audio, SAMPLE_RATE_HZ, 16_000), np.float32)))
    lengths = np.array([len(mel) for mel in mels])
    partial = target.with_suffix(".partial.npz")
    np.savez(partial, allow_pickle=False, mel=np.concatenate(mels), lengths=lengths, speaker=np.stack(speakers))
    partial.rename(target)
    return float(lengths.sum()) / 50 / 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", help="speaker vectors by its tokenizers, not by those of the runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = assets.data_dir() / "mels"
    folder.mkdir(parents=True, exist_ok=True)
    source, tokenizers = volume.open_source_filter(), open_tokenizers(arguments.checkpoint, arguments.threads)
    hours = 0.0
    for shard in sorted((assets.data_dir() / "plain").glob("shard-?????.npz")):
        target = folder / shard.name
        if target.exists():
            hours += float(np.load(target)["lengths"].sum()) / 50 / 3600
        elif hours < arguments.hours:
            hours += write(shard, target, source, tokenizers.voice)
            print(f"{target.name}: {hours:.2f} h", flush=True)


if __name__ == "__main__":
    main()
