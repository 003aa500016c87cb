"""What the trainings read: audio, F0 and the teacher's hidden states of every corpus row, in memory-mapped shards.

`python -m services.trainer.recipes.nano.features` turns the rows rendered so far into shards; called again, it
takes the new ones. A shard is a folder of flat arrays and an index: audio (int16, 24 kHz), f0 (float16, 100 Hz, 0
unvoiced), last (float16, Whisper's last states averaged to 16.67 Hz). Knows nothing about models.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr
import torch

from services.trainer.recipes.nano import assets
from services.trainer.recipes.nano.run import pick_device
from services.trainer.recipes.nano.whisper import WhisperEncoder
from shared.audio.features import whisper_log_mel
from shared.checkpoints.weights import default_dtype

ARRAYS = {"audio": np.int16, "f0": np.float16, "last": np.float16}
WIDTH = {"audio": 1, "f0": 1, "last": 512}
SHARD_ROWS = 400
F0_RATE_HZ = 100


def stub_torchaudio() -> None:
    """Some judges import torchaudio for resampling they are never asked for; there is no CPU build of it."""
    if "torchaudio" not in sys.modules:
        fake, transforms = types.ModuleType("torchaudio"), types.ModuleType("torchaudio.transforms")
        transforms.Resample = object  # type: ignore[attr-defined]
        fake.transforms = transforms  # type: ignore[attr-defined]
        sys.modules.update({"torchaudio": fake, "torchaudio.transforms": transforms})


class F0Tracker:
    """FCPE (MIT): F0 in Hz at 100 Hz, 0 where unvoiced."""

    def __init__(self) -> None:
        stub_torchaudio()
        from torchfcpe import spawn_bundled_infer_model

        self._model = spawn_bundled_infer_model("cpu")

    @torch.inference_mode()
    def __call__(self, audio_16k: np.ndarray) -> np.ndarray:
        f0 = self._model.infer(
            torch.from_numpy(audio_16k)[None, :, None],
            sr=16_000,
            decoder_mode="local_argmax",
            threshold=0.006,
            f0_min=50,
            f0_max=650,
        )
        return np.asarray(f0.ravel().numpy()[: len(audio_16k) // 160])


class Extractor:
    """One recording to the three arrays of a row."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._whisper = WhisperEncoder.of_assets(str(device), default_dtype(device))

    @cached_property
    def _f0(self) -> F0Tracker:
        return F0Tracker()

    def __call__(
        self, audio_24k: np.ndarray, voiced: bool = True, f0: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """24 kHz float32 (n,) -> the arrays; a whisper is marked unvoiced throughout. `f0` (n / 240,) where known."""
        audio_16k = np.asarray(soxr.resample(audio_24k, 24_000, 16_000), np.float32)
        mel = whisper_log_mel(torch.from_numpy(audio_16k).to(self.device), bins=80)[None]
        last = self._whisper(mel)[1][0].float().cpu()
        if f0 is None:
            f0 = self._f0(audio_16k) if voiced else np.zeros(len(audio_16k) // 160, np.float32)
        return {
            "audio": (np.clip(audio_24k, -1, 1) * 32767).astype(np.int16),
            "f0": f0.astype(np.float16),
            "last": pool(last, 3).numpy().astype(np.float16),
        }


def pool(states: torch.Tensor, by: int) -> torch.Tensor:
    """Mean of every `by` frames, (T, C) -> (T // by, C)."""
    frames = len(states) // by
    return states[: frames * by].view(frames, by, -1).mean(1)


def corpus_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """All rendered rows, by index."""
    rows = [json.loads(line) for file in folder.glob("manifest-*.jsonl") for line in file.read_text().splitlines()]
    yield from sorted(rows, key=lambda row: row["index"])


def save_pitch(target: Path | BinaryIO, index: Sequence[object], pitch: Sequence[np.ndarray]) -> None:
    """Write F0 of rows by index, Hz at 100 Hz with 0 for unvoiced, in the form that `known_pitch` reads."""
    lengths = np.array([len(f0) for f0 in pitch])
    f0 = np.concatenate(pitch).astype(np.float16)
    np.savez(target, allow_pickle=False, index=np.array(index), lengths=lengths, f0=f0)


def known_pitch(corpus: Path) -> dict[int, np.ndarray]:
    """F0 by row index, where it came with the corpus (`bundle`, `volume`)."""
    found: dict[int, np.ndarray] = {}
    for file in [*corpus.glob("f0.npz"), *corpus.glob("manifest-*.npz")]:
        data = dict(np.load(file))
        parts = np.split(data["f0"].astype(np.float32), np.cumsum(data["lengths"])[:-1])
        found |= dict(zip(data["index"].tolist(), parts, strict=True))
    return found


def write_shard(
    rows: list[dict[str, Any]], corpus: Path, target: Path, extract: Extractor, known_f0: dict[int, np.ndarray]
) -> None:
    """Extract the rows into one shard; the folder appears whole."""
    partial = target.with_suffix(".partial")
    partial.mkdir(parents=True, exist_ok=True)
    files = {name: (partial / f"{name}.bin").open("wb") for name in ARRAYS}
    offsets, index = dict.fromkeys(ARRAYS, 0), []
    for row in rows:
        recording = next(f for s in ("flac", "opus") if (f := corpus / f"{row['index']:07d}.{s}").exists())
        audio, _ = soundfile.read(recording, dtype="float32")
        arrays = extract(audio, row["manner"] != "style/whisper", known_f0.get(row["index"]))
        spans = {}
        for name, array in arrays.items():
            files[name].write(np.ascontiguousarray(array).tobytes())
            spans[name] = (offsets[name], offsets[name] + len(array))
            offsets[name] += len(array)
        index.append(row | {"spans": spans})
    for file in files.values():
        file.close()
    (partial / "index.json").write_text(json.dumps(index, ensure_ascii=False))
    partial.rename(target)


class Store:
    """All shards as one sequence of rows. `store.array(i, "f0")` reads lazily from disk."""

    def __init__(self, folder: Path | None = None, keep: str = "train") -> None:
        folder = folder or assets.data_dir() / "features"
        self.rows: list[dict[str, Any]] = []
        self._maps: list[dict[str, np.ndarray]] = []
        self._shard: list[int] = []
        for path in sorted(folder.glob("shard-?????")):
            maps = {n: np.memmap(path / f"{n}.bin", t, "r").reshape(-1, WIDTH[n]) for n, t in ARRAYS.items()}
            for row in json.loads((path / "index.json").read_text()):
                if keep == "all" or row["held_out"] == (keep == "held_out"):
                    self.rows.append(row)
                    self._shard.append(len(self._maps))
            self._maps.append(maps)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def hours(self) -> float:
        return sum(float(row["duration_s"]) for row in self.rows) / 3600

    def array(self, i: int, name: str) -> np.ndarray:
        """One array of row i; audio and f0 flat, the others (frames, 512)."""
        start, stop = self.rows[i]["spans"][name]
        found = self._maps[self._shard[i]][name][start:stop]
        return np.asarray(found[:, 0] if WIDTH[name] == 1 else found)

    def audio(self, i: int) -> np.ndarray:
        """24 kHz float32 audio of row i."""
        return self.array(i, "audio").astype(np.float32) / 32767


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--partial", action="store_true", help="also write a last shard that is not full")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    corpus, target = assets.data_dir() / "corpus", assets.data_dir() / "features"
    done = {row["index"] for row in Store(target, keep="all").rows}
    rows = [row for row in corpus_rows(corpus) if row["index"] not in done]
    number = len(list(target.glob("shard-?????"))) if target.exists() else 0
    extract, known_f0 = Extractor(pick_device()), known_pitch(corpus)
    for start in range(0, len(rows), SHARD_ROWS):
        block = rows[start : start + SHARD_ROWS]
        if len(block) == SHARD_ROWS or arguments.partial:
            write_shard(block, corpus, target / f"shard-{number:05d}", extract, known_f0)
            number += 1
            print(f"shard {number}: {len(block)} rows", flush=True)


if __name__ == "__main__":
    main()
