"""SHA256SUMS: the hash list of a checkpoint, in the format of the `sha256sum` tool. Knows nothing about the files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from shared.errors import UserError

FILE = "SHA256SUMS"


def read(root: Path) -> dict[str, str] | None:
    """Hashes by path relative to `root`, None where there is no list. Raises UserError for a malformed line."""
    path = root / FILE
    if not path.is_file():
        return None
    hashes = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64:
            raise UserError(f"{path}, line {number}, is not '<sha256>  <path>': {line!r}.", code="manifest_invalid")
        hashes[name.removeprefix("*")] = digest.lower()
    return hashes


def write(root: Path, hashes: Mapping[str, str]) -> None:
    """Write the list of hashes by relative path, sorted, whole or not at all."""
    begun = root / f"{FILE}.part"
    begun.write_text("".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)), encoding="utf-8")
    os.replace(begun, root / FILE)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
