"""Codes and speaker vectors of every corpus row, by the trained tokenizers. `python -m
services.trainer.recipes.nano.codes`.

Untrimmed, so that codes and mel stay aligned for the flow. Every row also gives the codes of itself in noise and of
itself with pauses put between its words: what denoise and vad edits start from. One file a shard; shards that have
one are left.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch

from services.trainer.recipes.nano import assets, augment, corpus, linguistic, semantic, speaker
from services.trainer.recipes.nano.features import Store
from services.trainer.recipes.nano.run import Run, pick_device
from shared.audio.features import speaker_fbank, whisper_log_mel
from shared.models.linguistic import nearest


class Tokenizers:
    """The three trained encoders of the runs before, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.student, self.pupil = linguistic.Student(), speaker.Pupil(512)
        self.autoencoder = semantic.Autoencoder(linguistic.CONFIG.output_size)
        for name, model in (("linguistic", self.student), ("semantic", self.autoencoder), ("speaker", self.pupil)):
            if Run(name, {"model": model}, 0).step == 0:
                raise SystemExit(f"train it first: python -m services.trainer.recipes.nano.{name}")
            model.to(device).eval()

    @torch.inference_mode()
    def __call__(self, audio_16k: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """16 kHz (n,) -> linguistic (T,) and semantic (T,) codes int16, speaker vector (192,)."""
        peak = max(1e-4, float(np.abs(audio_16k).max()))
        wave = torch.from_numpy(audio_16k / peak * 0.999).to(self.device)[None]
        s = self.student
        hidden = s.encoder(s.features(wave))
        feats = whisper_log_mel(wave)
        lengths = torch.tensor([feats.shape[2]], device=self.device)
        vectors = self.autoencoder.encoder.encode(feats, lengths)[0]
        return (
            nearest(hidden, s.codebook.centroids)[0].cpu().numpy().astype(np.int16),
            self.autoencoder.codebook.nearest(vectors).cpu().numpy().astype(np.int16),
            self.pupil.encoder(speaker_fbank(wave))[0].cpu().numpy(),
        )


VARIANTS = ("clean", "noisy", "paused")


def variants(audio: np.ndarray, row: dict[str, Any]) -> dict[str, np.ndarray]:
    """16 kHz audio (n,) as it is, in noise of 2 to 15 dB, and with one to three pauses of 0.35 to 0.9 s at quiet
    places."""
    rng = np.random.default_rng((corpus.SEED, row["index"]))
    noisy = augment.add_noise(audio, augment.any_noise(len(audio), rng), float(rng.uniform(2, 15)))
    return {"clean": audio, "noisy": noisy, "paused": with_pauses(audio, int(rng.integers(1, 4)), rng)}


def with_pauses(audio: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Silence put in at `number` of the quietest tenths of the inner 20 ms frames."""
    frames = audio[: len(audio) // 320 * 320].reshape(-1, 320)
    level = (frames**2).mean(1)
    inner = np.arange(len(level) // 8, len(level) - len(level) // 8)
    quiet = inner[np.argsort(level[inner])[: max(number, len(inner) // 10)]]
    places = sorted({int(p) for p in rng.choice(quiet, min(number, len(quiet)), replace=False)}) if len(quiet) else []
    pieces, start = [], 0
    for place in places:
        pieces += [audio[start : place * 320], np.zeros(int(rng.uniform(0.35, 0.9) * 16_000), np.float32)]
        start = place * 320
    return np.concatenate([*pieces, audio[start:]]).astype(np.float32)


def write_codes(store: Store, tokenizers: Tokenizers, indices: list[int], target: Path) -> None:
    """One .npz for the rows of one shard: per variant flat codes and their lengths, and the clean speaker vectors."""
    arrays: dict[str, np.ndarray] = {"index": np.array([store.rows[i]["index"] for i in indices])}
    found: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {name: [] for name in VARIANTS}
    for i in indices:
        audio = np.asarray(soxr.resample(store.audio(i), 24_000, 16_000), np.float32)
        for name, variant in variants(audio, store.rows[i]).items():
            found[name].append(tokenizers(variant))
    for name, rows in found.items():
        arrays[f"{name}_linguistic"] = np.concatenate([a for a, _, _ in rows])
        arrays[f"{name}_semantic"] = np.concatenate([b for _, b, _ in rows])
        arrays[f"{name}_lengths"] = np.array([(len(a), len(b)) for a, b, _ in rows])
    arrays["speaker"] = np.stack([c for _, _, c in found["clean"]])
    partial = target.with_suffix(".partial.npz")
    np.savez(partial, allow_pickle=False, **arrays)
    partial.rename(target)


class Coded:
    """Rows of the store that have codes: the row, its speaker vector, and per variant its linguistic and semantic
    codes."""

    def __init__(self, keep: str = "train") -> None:
        self.store = Store(keep=keep)
        position = {row["index"]: i for i, row in enumerate(self.store.rows)}
        self.items: list[dict[str, Any]] = []
        for file in sorted((assets.data_dir() / "codes").glob("shard-?????.npz")):
            data = dict(np.load(file))
            ends = {name: np.cumsum(data[f"{name}_lengths"], axis=0) for name in VARIANTS}
            for k, index in enumerate(data["index"].tolist()):
                if index in position:
                    item = {
                        "i": position[index],
                        "row": self.store.rows[position[index]],
                        "speaker": data["speaker"][k],
                    }
                    for name in VARIANTS:
                        stop, length = ends[name][k], data[f"{name}_lengths"][k]
                        item[name] = tuple(
                            data[f"{name}_{kind}"][stop[c] - length[c] : stop[c]].astype(np.int32)
                            for c, kind in enumerate(("linguistic", "semantic"))
                        )
                    self.items.append(item)

    def __len__(self) -> int:
        return len(self.items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder, features = assets.data_dir() / "codes", assets.data_dir() / "features"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizers, store = Tokenizers(pick_device()), Store(keep="all")
    position = {row["index"]: i for i, row in enumerate(store.rows)}
    for shard in sorted(features.glob("shard-?????")):
        target = folder / f"{shard.name}.npz"
        if not target.exists():
            rows = json.loads((shard / "index.json").read_text())
            write_codes(store, tokenizers, [position[row["index"]] for row in rows], target)
            print(f"{target.name}: {len(rows)} rows", flush=True)


if __name__ == "__main__":
    main()
