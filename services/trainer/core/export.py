"""A trained language model back into the published layout: the base checkpoint with other weights in it.

Unchanged files are linked where the file system can, so a version costs its language model only.
Knows nothing about training.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from shared.checkpoints import manifest
from shared.checkpoints.layout import METADATA_FILE, Checkpoint
from shared.checkpoints.reward import FOLDER as REWARD_FOLDER
from shared.checkpoints.weights import read_headers

SHARD_BYTES = 4_500_000_000
INDEX = "model.safetensors.index.json"


def write_checkpoint(
    base: Checkpoint, target: Path, state: Mapping[str, Tensor], *, name: str, version: str,
    facts: Mapping[str, object], sounds: Sequence[str] = (),
) -> Checkpoint:  # fmt: skip
    """Write `target` as `base` with the language model's weights replaced, in the base's dtype.

    `facts` (what it was trained from) go into editx.json, whose other entries stay; `sounds` are paralinguistic tags
    that it has learned besides the base's edits. The folder appears whole; an older one is replaced.
    """
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    _mirror(base, partial)
    made = Checkpoint(partial)
    folder = made.step1_dir
    dtype = next(iter(read_headers(base.step1_files[0]).values())).dtype
    for file in (*made.step1_files, folder / INDEX):
        file.unlink(missing_ok=True)
    save_weights({n: t.to(getattr(torch, dtype)) for n, t in state.items()}, folder)
    document = _described(base, sounds) | {"name": name, "version": version, "training": dict(facts)}
    _replace(partial / METADATA_FILE, json.dumps(document, indent=2, default=str) + "\n")
    write_sums(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return Checkpoint(target)


def write_with_reward(base: Checkpoint, reward: Path, target: Path) -> Checkpoint:
    """Write `target` as `base` with the reward model of the folder `reward` in it. The folder appears whole."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    _mirror(base, partial)
    _link_tree(reward, partial / REWARD_FOLDER)
    (partial / REWARD_FOLDER / manifest.FILE).unlink(missing_ok=True)
    _replace(partial / METADATA_FILE, json.dumps(_described(base, ()), indent=2) + "\n")
    write_sums(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return Checkpoint(target)


def save_weights(state: Mapping[str, Tensor], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """model.safetensors, or several and their index when they are larger than a shard."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in state.values())
    _replace(folder / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def write_sums(root: Path) -> None:
    """SHA256SUMS of every other file below root."""
    files = [file for file in root.rglob("*") if file.is_file() and file.name != manifest.FILE]
    (root / manifest.FILE).unlink(missing_ok=True)
    manifest.write(root, {file.relative_to(root).as_posix(): manifest.sha256(file) for file in files})


def _mirror(base: Checkpoint, target: Path) -> None:
    """The files of a checkpoint, nested as published unless the base is flat."""
    if base.editx_dir == base.tokenizer_dir:
        _link_tree(base.root, target)
        return
    _link_tree(base.editx_dir, target / "Step-Audio-EditX")
    _link_tree(base.tokenizer_dir, target / "Step-Audio-Tokenizer")


def _link_tree(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


def _replace(path: Path, text: str) -> None:
    """Write a text to a new file, so that a linked original stays as it was."""
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


def _described(base: Checkpoint, sounds: Sequence[str]) -> dict[str, Any]:
    """The base's metadata with more sounds; a base that does not say what it learned is said to know all.

    What only the base's own recipe reads in its file is kept.
    """
    file = base.root / METADATA_FILE
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    document |= base.metadata.model_dump(mode="json", exclude_none=True)
    known = base.metadata.trained_on
    if known is not None:
        document["trained_on"]["paralinguistic"] = sorted({*known.paralinguistic, *sounds})
    return document
