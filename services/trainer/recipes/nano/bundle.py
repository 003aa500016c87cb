"""Carry a training step to another machine and its result back, in files of bounded size.

A GPU machine may be reachable only by copying files. `pack` writes one tar with what a step reads (audio as Opus,
codes, the runs before it), below a limit; `unpack` lays it out in the data folder there; afterwards `pack --result`
brings the run back.

    python -m services.trainer.recipes.nano.bundle pack tokenizers out/tokenizers.tar --megabytes 60
    python -m services.trainer.recipes.nano.bundle unpack out/tokenizers.tar
    python -m services.trainer.recipes.nano.bundle pack --result flow out/flow.tar

Features of Opus audio are extracted again there, so the teacher's files travel with the part that needs them.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from services.trainer.recipes.nano import assets
from services.trainer.recipes.nano.features import Store
from services.trainer.recipes.nano.whisper import ENCODER_FILE, read_ctranslate2

PARTS = {
    "tokenizers": ("audio", "whisper"),
    "decoder": ("audio", "runs/linguistic", "runs/semantic", "runs/speaker"),
    "llm": ("codes", "plain", "runs/text", "runs/linguistic", "runs/semantic"),
}
"""What each part reads. The runs before a step travel without their optimizers."""


def pack(part: str, target: Path, megabytes: float) -> float:
    """Write the tar; audio rows are added while there is room. Returns its size in MB.

    Raises:
        ValueError: what must travel is larger than the limit on its own.
    """
    root = assets.data_dir()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, "w") as out:
        for name in PARTS[part]:
            if name == "whisper":
                _add(out, ENCODER_FILE, _encoder_weights())
            elif name.startswith("runs/") and name != "runs/text":
                _add(out, f"{name}/state.pt", _without_optimizers(root / name / "state.pt"))
            elif name != "audio":
                for file in sorted((root / name).iterdir()):
                    out.add(file, f"{name}/{file.name}")
        if out.offset > megabytes * 1e6:
            raise ValueError(f"{part} needs {out.offset / 1e6:.1f} MB without any audio, over {megabytes} MB")
        if "audio" in PARTS[part]:
            _add_audio(out, megabytes)
    return target.stat().st_size / 1e6


def _add(out: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    out.addfile(entry, io.BytesIO(data))


def _encoder_weights() -> bytes:
    """Whisper's encoder alone, float16 compressed: a third of the file."""
    variables = read_ctranslate2(assets.prepare().whisper / "model.bin")
    arrays = {k: np.asarray(v, np.float16) for k, v in variables.items() if k.startswith("encoder/") and v.ndim}
    data = io.BytesIO()
    np.savez(data, allow_pickle=False, **arrays)
    return data.getvalue()


def _without_optimizers(file: Path) -> bytes:
    saved = torch.load(file, map_location="cpu", weights_only=True)
    saved["parts"] = {name: part for name, part in saved["parts"].items() if name in ("model", "average")}
    data = io.BytesIO()
    torch.save(saved, data)
    return data.getvalue()


def _add_audio(out: tarfile.TarFile, megabytes: float) -> None:
    """Rows of the store as Opus files, one manifest and their F0, in an order that any prefix of is a fair sample."""
    store = Store()
    rows: list[dict[str, Any]] = []
    pitch: list[np.ndarray] = []
    for i in np.random.default_rng(0).permutation(len(store)).tolist():
        data = io.BytesIO()
        soundfile.write(data, store.audio(i), 24_000, format="OGG", subtype="OPUS")
        if out.offset + len(data.getvalue()) + 2500 * (len(rows) + 1) > megabytes * 1e6:
            break
        _add(out, f"corpus/{store.rows[i]['index']:07d}.opus", data.getvalue())
        pitch.append(store.array(i, "f0"))
        rows.append({key: value for key, value in store.rows[i].items() if key != "spans"})
    manifest = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _add(out, "corpus/manifest-0-of-1.jsonl", manifest.encode())
    data = io.BytesIO()
    index, lengths = np.array([row["index"] for row in rows]), np.array([len(p) for p in pitch])
    np.savez(data, allow_pickle=False, index=index, lengths=lengths, f0=np.concatenate(pitch))
    _add(out, "corpus/f0.npz", data.getvalue())


def pack_result(run: str, target: Path, megabytes: float) -> float:
    """The run's weights and log, without optimizers. Raises ValueError where that is over the limit."""
    folder = assets.data_dir() / "runs" / run
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, "w") as out:
        _add(out, f"runs/{run}/state.pt", _without_optimizers(folder / "state.pt"))
        out.add(folder / "log.jsonl", f"runs/{run}/log.jsonl")
    size = target.stat().st_size / 1e6
    if size > megabytes:
        raise ValueError(f"the result of {run} has {size:.1f} MB, over {megabytes} MB")
    return size


def unpack(file: Path) -> list[str]:
    """Lay the files out in the data folder; names that lead out of it are refused."""
    with tarfile.open(file) as archive:
        archive.extractall(assets.data_dir(), filter="data")
        return archive.getnames()


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("names", nargs="+", help="the part (or, with --result, the run) and the file")
    parser.add_argument("--result", action="store_true")
    parser.add_argument("--megabytes", type=float, default=60.0)
    given = parser.parse_args(None if arguments is None else list(arguments))
    if given.action == "unpack":
        print(f"{len(unpack(Path(given.names[0])))} files")
        return
    name, target = given.names
    size = (pack_result if given.result else pack)(name, Path(target), given.megabytes)
    print(f"{target}: {size:.1f} MB")


if __name__ == "__main__":
    main()
