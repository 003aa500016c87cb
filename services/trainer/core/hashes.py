"""What the weights that a run starts from are, in one hash. Knows nothing about checkpoints' layouts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from shared.checkpoints import manifest


def weights_hash(files: Iterable[Path]) -> str:
    """SHA-256 over the contents of weight files, in the order of their names, in hex."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(manifest.sha256(file).encode())
    return digest.hexdigest()
