"""What the weights that a run starts from, or that coded a data set, are, in one hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from shared.checkpoints import manifest
from shared.checkpoints.layout import Checkpoint


def weights_hash(files: Iterable[Path]) -> str:
    """SHA-256 over the contents of weight files, in the order of their names, in hex."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(manifest.sha256(file).encode())
    return digest.hexdigest()


def tokenizer_hash(checkpoint: Checkpoint) -> str:
    """The hash of the weights that turn recordings into codes."""
    return weights_hash([checkpoint.linguistic_file, checkpoint.centroids_file, checkpoint.semantic_onnx])
