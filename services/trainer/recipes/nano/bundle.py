"""Carry a training step to another machine and its result back, in files of bounded size.

A GPU machine may be reachable only by copying files. `pack` writes one tar with what a step reads (audio as Opus,
codes, the runs before it), below a limit; `unpack` lays it out in the data folder there; afterwards `pack --result`
brings the run back.

    python -m services.trainer.recipes.nano.bundle pack tokenizers out/tokenizers.tar --megabytes 60
    python -m services.trainer.recipes.nano.bundle unpack out/tokenizers.tar
    python -m services.trainer.recipes.nano.bundle pack --result flow out/flow.tar --megabytes 15
    python -m services.trainer.recipes.nano.bundle unpack out/flow.tar.0 out/flow.tar.1

Features of Opus audio are extracted again there, so the teacher's files travel with the part that needs them.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from services.trainer.recipes.nano import assets
from services.trainer.recipes.nano.features import Store, save_pitch
from services.trainer.recipes.nano.whisper import ENCODER_FILE, read_ctranslate2

PARTS = {
    "tokenizers": ("audio", "whisper"),
    "decoder": ("audio", "runs/linguistic", "runs/semantic", "runs/speaker"),
    "llm": ("codes", "plain", "runs/text", "runs/linguistic", "runs/semantic"),
    "recognizer": ("codes", "plain", "runs/flow"),
    "words": ("codes", "plain", "runs/text", "runs/llm", "runs/recognizer"),
}
"""What each part reads. The runs before a step travel in float16 without their optimizers."""


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
                _add(out, f"{name}/state.pt", _without_optimizers(root / name / "state.pt", torch.float16))
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


def _without_optimizers(file: Path, dtype: torch.dtype) -> bytes:
    """The weights of a run: the averaged ones where the training kept an average, else the last."""
    saved = torch.load(file, map_location="cpu", weights_only=True)
    kept = "average" if "average" in saved["parts"] else "model"
    weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in saved["parts"][kept].items()}
    data = io.BytesIO()
    torch.save({**saved, "parts": {kept: weights}}, data)
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
    save_pitch(data, [row["index"] for row in rows], pitch)
    _add(out, "corpus/f0.npz", data.getvalue())


def pack_result(run: str, target: Path, megabytes: float) -> list[Path]:
    """The run's weights in bfloat16 and its log, as one tar cut into pieces `<target>.0`, `.1`, ... below the limit."""
    folder, data = assets.data_dir() / "runs" / run, io.BytesIO()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=data, mode="w") as out:
        _add(out, f"runs/{run}/state.pt", _without_optimizers(folder / "state.pt", torch.bfloat16))
        out.add(folder / "log.jsonl", f"runs/{run}/log.jsonl")
    whole, size = data.getvalue(), int(megabytes * 1e6)
    pieces = [target.with_name(f"{target.name}.{number}") for number in range(-(-len(whole) // size))]
    for number, piece in enumerate(pieces):
        piece.write_bytes(whole[number * size : (number + 1) * size])
    return pieces


def unpack(files: Sequence[Path]) -> list[str]:
    """Lay out one tar, or one cut into pieces given in order, in the data folder; names that lead out are refused."""
    whole = io.BytesIO(b"".join(file.read_bytes() for file in files))
    with tarfile.open(fileobj=whole) as archive:
        archive.extractall(assets.data_dir(), filter="data")
        return archive.getnames()


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("names", nargs="+", help="part (or run, with --result) and file; of unpack, files")
    parser.add_argument("--result", action="store_true")
    parser.add_argument("--megabytes", type=float, default=60.0)
    given = parser.parse_args(None if arguments is None else list(arguments))
    if given.action == "unpack":
        print(f"{len(unpack([Path(name) for name in given.names]))} files")
    elif given.result:
        print(*pack_result(given.names[0], Path(given.names[1]), given.megabytes))
    else:
        print(f"{given.names[1]}: {pack(given.names[0], Path(given.names[1]), given.megabytes):.1f} MB")


if __name__ == "__main__":
    main()
