"""Codes and speaker vectors of every corpus row, by the trained tokenizers. `python -m
services.trainer.recipes.nano.codes`.

Untrimmed, so that codes and mel stay aligned for the flow. Every third row also gives the codes of itself in noise
and of itself with pauses put between its words: what denoise and vad edits start from. One file a shard; shards that
have one are left, and several processes share the work by `--part k/n`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch

from services.trainer.recipes.nano import assets, augment, corpus, linguistic, semantic, speaker
from services.trainer.recipes.nano.features import Store
from services.trainer.recipes.nano.run import pick_device, trained
from shared.audio.features import speaker_fbank, whisper_log_mel
from shared.checkpoints.layout import Checkpoint
from shared.checkpoints.tokenizer import load_linguistic, load_semantic, load_speaker
from shared.codes import LINGUISTIC_PAD, LINGUISTIC_SIZE, SEMANTIC_SIZE
from shared.models.linguistic import nearest


class Tokenizers:
    """The three trained encoders of the runs before, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.student, self.pupil = linguistic.Student(), speaker.Pupil(512)
        self.autoencoder = semantic.Autoencoder(linguistic.CONFIG.output_size)
        for name, model in (("linguistic", self.student), ("semantic", self.autoencoder), ("speaker", self.pupil)):
            trained(name, "model", model).to(device)

    def _wave(self, audio_16k: np.ndarray) -> torch.Tensor:
        return _full_scale(audio_16k).to(self.device)[None]

    @torch.inference_mode()
    def voice(self, audio_16k: np.ndarray) -> np.ndarray:
        """16 kHz (n,) -> speaker vector (192,)."""
        vector: np.ndarray = self.pupil.encoder(speaker_fbank(self._wave(audio_16k)))[0].cpu().numpy()
        return vector

    @torch.inference_mode()
    def __call__(self, audio_16k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """16 kHz (n,) -> linguistic (T,) and semantic (T,) codes, int16."""
        wave = self._wave(audio_16k)
        s = self.student
        hidden = s.encoder(s.features(wave))
        feats = whisper_log_mel(wave, bins=semantic.CONFIG.bins)
        lengths = torch.tensor([feats.shape[2]], device=self.device)
        vectors = self.autoencoder.encoder.encode(feats, lengths)[0]
        return (
            nearest(hidden, s.codebook.centroids)[0].cpu().numpy().astype(np.int16),
            self.autoencoder.codebook.nearest(vectors).cpu().numpy().astype(np.int16),
        )


class ReleasedTokenizers:
    """The same, of a checkpoint in the published layout: for a machine that has not the runs (`restore`)."""

    def __init__(self, name: str, threads: int) -> None:
        checkpoint = Checkpoint.resolve(name)
        self._linguistic = load_linguistic(checkpoint)
        self._semantic = load_semantic(checkpoint, threads=threads)
        self._speaker = load_speaker(checkpoint, threads=threads)

    def voice(self, audio_16k: np.ndarray) -> np.ndarray:
        """16 kHz (n,) -> speaker vector (192,)."""
        return self._speaker.embed([_full_scale(audio_16k)])[0]

    def __call__(self, audio_16k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """16 kHz (n,) -> linguistic (T,) and semantic (T,) codes, int16."""
        rows = [_full_scale(audio_16k)]
        return self._linguistic.encode(rows)[0].astype(np.int16), self._semantic.encode(rows)[0].astype(np.int16)


def _full_scale(audio: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(audio / max(1e-4, float(np.abs(audio).max())) * 0.999)


def open_tokenizers(checkpoint: str | None, threads: int) -> Tokenizers | ReleasedTokenizers:
    """Those of the runs, or of a checkpoint."""
    return Tokenizers(pick_device()) if checkpoint is None else ReleasedTokenizers(checkpoint, threads)


VARIANTS = ("clean", "noisy", "paused")
VARIED_EVERY = 3


Pauses = list[tuple[float, float]]
"""Where silence was put in, and how much: seconds of the audio before, seconds."""


def variants(audio: np.ndarray, index: int) -> tuple[dict[str, np.ndarray], Pauses]:
    """16 kHz audio (n,) as it is, in noise of 2 to 15 dB, and with one to three pauses of 0.35 to 0.9 s at quiet
    places; and those places."""
    rng = np.random.default_rng((corpus.SEED, index))
    noisy = augment.add_noise(audio, augment.any_noise(len(audio), rng), float(rng.uniform(2, 15)))
    paused, pauses = with_pauses(audio, int(rng.integers(1, 4)), rng)
    return {"clean": audio, "noisy": noisy, "paused": paused}, pauses


def with_pauses(audio: np.ndarray, number: int, rng: np.random.Generator) -> tuple[np.ndarray, Pauses]:
    """Silence put in at `number` of the quietest tenths of the inner 20 ms frames, and where."""
    frames = audio[: len(audio) // 320 * 320].reshape(-1, 320)
    level = (frames**2).mean(1)
    inner = np.arange(len(level) // 8, len(level) - len(level) // 8)
    quiet = inner[np.argsort(level[inner])[: max(number, len(inner) // 10)]]
    places = sorted({int(p) for p in rng.choice(quiet, min(number, len(quiet)), replace=False)}) if len(quiet) else []
    pieces, start, pauses = [], 0, []
    for place in places:
        length_s = float(rng.uniform(0.35, 0.9))
        pieces += [audio[start : place * 320], np.zeros(int(length_s * 16_000), np.float32)]
        pauses.append((place * 0.02, length_s))
        start = place * 320
    return np.concatenate([*pieces, audio[start:]]).astype(np.float32), pauses


def other_codes(count: int, rng: np.random.Generator) -> torch.Tensor:
    """Random pairs (count, 2), each code of its own kind."""
    linguistic = rng.integers(LINGUISTIC_SIZE, size=count)
    semantic = LINGUISTIC_PAD + 1 + rng.integers(SEMANTIC_SIZE, size=count)
    return torch.from_numpy(np.stack([linguistic, semantic], 1))


Item = dict[str, Any]
"""A row with its codes: "row", "clean" and where made "noisy" and "paused" (pairs of linguistic and semantic codes),
"pauses", and of some "speaker" (192,) and "mel" (frames, 80) float16."""


def save_items(items: Sequence[Item], target: Path) -> None:
    """Write items as one .npz: flat codes with their lengths, rows as JSON. The file appears whole."""
    arrays: dict[str, np.ndarray] = {}
    for name in VARIANTS:
        pairs = [item.get(name, (np.zeros(0, np.int16), np.zeros(0, np.int16))) for item in items]
        arrays[f"{name}_linguistic"] = np.concatenate([a for a, _ in pairs])
        arrays[f"{name}_semantic"] = np.concatenate([b for _, b in pairs])
        arrays[f"{name}_lengths"] = np.array([(len(a), len(b)) for a, b in pairs])
    if "speaker" in items[0]:
        arrays["speaker"] = np.stack([item["speaker"] for item in items])
    if "mel" in items[0]:
        arrays["mel"] = np.concatenate([item["mel"] for item in items])
        arrays["mel_lengths"] = np.array([len(item["mel"]) for item in items])
    rows = [{"row": item["row"], "pauses": item.get("pauses", [])} for item in items]
    arrays["rows"] = np.frombuffer(json.dumps(rows).encode(), np.uint8)
    partial = target.with_suffix(".partial.npz")
    np.savez(partial, allow_pickle=False, **arrays)
    partial.rename(target)


def load_items(file: Path) -> Iterator[Item]:
    """What `save_items` wrote."""
    data = dict(np.load(file))
    ends = {name: np.cumsum(data[f"{name}_lengths"], axis=0) for name in VARIANTS}
    mels = np.split(data["mel"], np.cumsum(data["mel_lengths"])[:-1]) if "mel" in data else []
    for k, item in enumerate(json.loads(data["rows"].tobytes())):
        for name in VARIANTS:
            stop, length = ends[name][k], data[f"{name}_lengths"][k]
            if length.all():
                item[name] = tuple(
                    data[f"{name}_{kind}"][stop[c] - length[c] : stop[c]].astype(np.int32)
                    for c, kind in enumerate(("linguistic", "semantic"))
                )
        if "speaker" in data:
            item["speaker"] = data["speaker"][k]
        if mels:
            item["mel"] = mels[k]
        yield item


def coded(
    row: dict[str, Any], audio_16k: np.ndarray, tokenizers: Tokenizers | ReleasedTokenizers, number: int, varied: bool
) -> Item:
    """The codes of a reading, with those of its variants where asked for."""
    if not varied:
        return {"row": row, "clean": tokenizers(audio_16k)}
    made, pauses = variants(audio_16k, number)
    return {"row": row, "pauses": pauses} | {name: tokenizers(audio) for name, audio in made.items()}


class Coded:
    """Rows of the store that have codes."""

    def __init__(self, keep: str = "train") -> None:
        self.store = Store(keep=keep)
        self.position = {row["index"]: i for i, row in enumerate(self.store.rows)}
        """Of a row in the store, by its index."""
        self.items: list[Item] = []
        for file in sorted((assets.data_dir() / "codes").glob("shard-?????.npz")):
            self.items += [item for item in load_items(file) if item["row"]["index"] in self.position]

    def __len__(self) -> int:
        return len(self.items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", default="0/1", help="this process and how many there are")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", help="encode by its tokenizers, not by those of the runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    part, parts = (int(x) for x in arguments.part.split("/"))
    folder, features = assets.data_dir() / "codes", assets.data_dir() / "features"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizers, store = open_tokenizers(arguments.checkpoint, arguments.threads), Store(keep="all")
    position = {row["index"]: i for i, row in enumerate(store.rows)}
    for shard in sorted(features.glob("shard-?????"))[part::parts]:
        target = folder / f"{shard.name}.npz"
        if not target.exists():
            items = []
            for row in json.loads((shard / "index.json").read_text()):
                audio = np.asarray(soxr.resample(store.audio(position[row["index"]]), 24_000, 16_000), np.float32)
                kept = {key: value for key, value in row.items() if key != "spans"}
                item = coded(kept, audio, tokenizers, row["index"], row["index"] % VARIED_EVERY == 0)
                items.append(item | {"speaker": tokenizers.voice(audio)})
            save_items(items, target)
            print(f"{target.name}: {len(items)} rows", flush=True)


if __name__ == "__main__":
    main()
