"""Versioned sets of rows: a folder with rows.jsonl and manifest.json, named by the hash of what is in it.

Building the same rows gives the same version; a changed row gives another. Sets lie in a folder and travel through the
artifact store. Every row that is refused is reported with its number and the reason. Knows nothing about training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import ValidationError

from services.trainer.data.rows import Row, Side, reason
from shared.errors import UserError
from shared.store.port import ArtifactStore

log = logging.getLogger(__name__)

ROWS, MANIFEST, AUDIO, SUMS = "rows.jsonl", "manifest.json", "audio", "SHA256SUMS"
OnBad = Literal["skip", "fail"]


@dataclass(frozen=True)
class Refused:
    """A row that was left out: which (line or position, and its id if it has one) and why."""

    row: int
    id: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """A set of rows; its recordings lie in `folders`. `version` is the first 16 hex digits of the hash of its rows."""

    name: str
    rows: tuple[Row, ...]
    made_by: dict[str, Any] = field(default_factory=dict)
    refused: tuple[Refused, ...] = ()
    folders: tuple[Path, ...] = field(default=(), compare=False)

    @property
    def content_hash(self) -> str:
        """SHA-256 over the rows in order."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(row.model_dump_json().encode() + b"\n")
        return digest.hexdigest()

    @property
    def version(self) -> str:
        return self.content_hash[:16]

    def manifest(self) -> dict[str, Any]:
        """What is known about the set without its rows."""
        return {
            "schema_version": 1, "name": self.name, "version": self.version, "sha256": self.content_hash,
            "rows": len(self.rows), "made_by": self.made_by,
            "licences": dict(Counter(row.licence for row in self.rows)),
            "origins": dict(Counter(row.origin for row in self.rows)),
            "refused": [refused.__dict__ for refused in self.refused],
        }  # fmt: skip

    def recording(self, row: Row, side: Side) -> Path:
        """The recording of one of a row's sides. Raises UserError for a set that does not have it."""
        path = find_audio(side.audio, self.folders)
        if path is None:
            raise UserError(f"The set {self.name} has no recording of row {row.id}.",
                            "Build it with keep_audio: true in its description.", "recording_missing")  # fmt: skip
        return path

    def audio_names(self) -> list[str]:
        """The recordings that belong to the set, as paths in its folder."""
        sides = (side for row in self.rows for side in (row.source, row.target, row.rejected) if side is not None)
        return sorted({side.audio for side in sides if side.audio is not None})

    def recordings(self) -> dict[str, Path]:
        """Those that are there."""
        found = {name: find_audio(name, self.folders) for name in self.audio_names()}
        return {name: path for name, path in found.items() if path is not None}

    def save(self, root: Path) -> Path:
        """Write the set below `root`/name/version, whole or not at all; an existing version is left as it is.

        Its recordings are copied with it.
        """
        folder = root / self.name / self.version
        if (folder / MANIFEST).exists():
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in self.recordings().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        _write(folder / ROWS, "".join(row.model_dump_json() + "\n" for row in self.rows).encode())
        _write(folder / MANIFEST, (json.dumps(self.manifest(), indent=2, ensure_ascii=False) + "\n").encode())
        return folder

    @classmethod
    def load(cls, folder: Path) -> Dataset:
        """Read a version's folder (or that of a set of one version), or a bare JSONL file of rows.

        Raises UserError where there is none, where there are several, and where the content does not match.
        """
        if folder.is_file():
            return replace(read_rows(folder, name=folder.stem), folders=(folder.parent,))
        folder = version_folder(folder)
        manifest = _manifest(folder / MANIFEST)
        read = read_rows(folder / ROWS, name=manifest["name"])
        dataset = cls(
            manifest["name"],
            read.rows,
            manifest["made_by"],
            tuple(Refused(**r) for r in manifest["refused"]),
            (folder,),
        )
        if dataset.content_hash != manifest["sha256"]:
            raise UserError(f"{folder}: the rows are not those of the manifest.", "Build or fetch the set again.",
                            "dataset_damaged")  # fmt: skip
        return dataset

    def publish(self, store: ArtifactStore) -> str:
        """Put the set with its recordings into the object store; its prefix there. The hashes of all come last.

        Raises UserError for a set without rows.
        """
        if not self.rows:
            raise UserError(f"The set {self.name} has no rows.", code="invalid_dataset")
        prefix, sums = f"datasets/{self.name}/{self.version}", {}
        rows = "".join(row.model_dump_json() + "\n" for row in self.rows).encode()
        manifest = json.dumps(self.manifest(), ensure_ascii=False).encode()
        recordings = ((name, path.read_bytes()) for name, path in self.recordings().items())
        for name, content in chain(recordings, [(ROWS, rows), (MANIFEST, manifest)]):
            store.put(f"{prefix}/{name}", content)
            sums[name] = hashlib.sha256(content).hexdigest()
        store.put(f"{prefix}/{SUMS}", "".join(f"{sum}  {name}\n" for name, sum in sorted(sums.items())).encode())
        return prefix


def version_folder(folder: Path) -> Path:
    """The folder of the version that a version's folder, or the folder of a set of one version, stands for."""
    if (folder / MANIFEST).exists():
        return folder
    versions = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    if len(versions) == 1:
        return versions[0]
    if versions:
        raise UserError(f"{folder} has {len(versions)} versions: {', '.join(path.name for path in versions)}.",
                        "Name one of them.", "dataset_not_found")  # fmt: skip
    why = f"it has no {MANIFEST}" if folder.exists() else "it is not there"
    raise UserError(f"{folder} is no data set: {why}.", "Give a folder that `editx data build` wrote.",
                    "dataset_not_found")  # fmt: skip


def _manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not {"name", "made_by", "refused", "sha256"} <= found.keys():
            raise ValueError("entries are missing")
    except ValueError as error:
        raise UserError(f"{path} is no manifest: {error}.", "Build or fetch the set again.", "dataset_damaged"
                        ) from error  # fmt: skip
    return found


def find_audio(name: str | None, folders: Sequence[Path]) -> Path | None:
    """The file of a recording that a row names, in the first folder that has it."""
    return next((folder / name for folder in folders if (folder / name).is_file()), None) if name else None


def fetch(store: ArtifactStore, prefix: str, root: Path) -> Dataset:
    """A set out of the object store, through a folder below `root`.

    Raises ArtifactNotFound, and UserError naming a file that is not what was published.
    """
    folder = root / "fetched" / prefix.replace("/", "-")
    for line in store.get(f"{prefix}/{SUMS}").decode().splitlines():
        expected, _, name = line.partition("  ")
        content = store.get(f"{prefix}/{name}")
        if hashlib.sha256(content).hexdigest() != expected or ".." in PurePosixPath(name).parts:
            raise UserError(f"{prefix}/{name} is not the file that was published.", "Publish the set again.",
                            "dataset_damaged")  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _write(folder / name, content)
    return Dataset.load(folder)


def read_rows(path: Path, *, name: str, on_bad: OnBad = "fail") -> Dataset:
    """The rows of a JSONL file, checked one by one.

    Raises UserError naming the first bad line, unless `on_bad` is "skip": then the set carries the list of them.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "they are no UTF-8 text"
        raise UserError(f"The rows {path} cannot be read: {why}.", code="dataset_not_found") from error
    return collect(name, _parsed(lines, path, on_bad), on_bad=on_bad)


def _parsed(lines: Iterable[str], path: Path, on_bad: OnBad) -> Iterator[Row | Refused]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield Row.model_validate_json(line)
        except ValidationError as error:
            yield Refused(number, _id_of(line), f"{path.name}, line {number}: {reason(error)}")


def collect(
    name: str, rows: Iterable[Row | Refused], *, made_by: dict[str, Any] | None = None, on_bad: OnBad = "fail"
) -> Dataset:
    """Rows into a set: refused ones reported, ids made sure to be unique, repeated content dropped.

    Repeats of content are normal (and counted as refused); two rows of one id and different content are a mistake.
    """
    kept: dict[str, Row] = {}
    seen: dict[str, str] = {}
    refused: list[Refused] = []
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Refused):
            _refuse(refused, row, on_bad)
        elif (key := row.content_key()) in seen:
            refused.append(Refused(number, row.id, f"says the same as {seen[key]}"))
        elif row.id in kept:
            _refuse(refused, Refused(number, row.id, "its id is taken by a row with other content"), on_bad)
        else:
            kept[row.id], seen[key] = row, row.id
    for one in refused:
        log.warning("row %d (%s) left out: %s", one.row, one.id, one.reason)
    return Dataset(name, tuple(kept.values()), made_by or {}, tuple(refused))


def _refuse(refused: list[Refused], row: Refused, on_bad: OnBad) -> None:
    if on_bad == "fail":
        raise UserError(f"Row {row.row} ({row.id or 'no id'}): {row.reason.removesuffix('.')}.",
                        "Mend it, or leave bad rows out: on_bad: skip in the description.", "bad_row")  # fmt: skip
    refused.append(row)


def _id_of(line: str) -> str:
    try:
        return str(json.loads(line).get("id", ""))
    except (ValueError, AttributeError):
        return ""


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
