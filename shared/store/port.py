"""The port for artifacts: objects under keys.

What every store promises; each adapter is tested against it by one contract suite.

A put is whole or absent: no reader ever sees a part of an object. Keys are plain paths such as
jobs/{id}/0-tokenize/tokens.safetensors. Putting a key again replaces the object, and the last whole one stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from shared.errors import TransientError, UserError

KEY_LENGTH_MAX = 512
_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")


class StoreUnavailable(TransientError):
    """The store did not answer, or has no room left."""

    default_code = "store_unavailable"


class ArtifactNotFound(UserError):
    """No object lies under the key."""

    default_code = "artifact_not_found"
    default_http_status = 404


class InvalidKey(UserError):
    """A key that could leave the store's folder or that a store cannot hold."""

    default_code = "invalid_key"


@dataclass(frozen=True)
class ArtifactInfo:
    """An object without its bytes.

    `sha256` is hexadecimal; empty where the store did not keep it (a presigned upload).
    """

    key: str
    size: int
    content_type: str
    modified_at: float
    sha256: str = ""


def check_key(key: str) -> str:
    """The key itself, if every store can hold it: segments of letters, digits and ._=+- between slashes.

    Raises InvalidKey.
    """
    if not key or len(key) > KEY_LENGTH_MAX or not all(_SEGMENT.fullmatch(segment) for segment in key.split("/")):
        raise InvalidKey(
            f"{key!r} is no artifact key.",
            "Use letters, digits and ._=+- in segments that start with a letter or digit.",
        )
    return key


class ArtifactStore(Protocol):
    """Where artifacts lie. Every method may be called by any thread."""

    def put(self, key: str, data: bytes | BinaryIO, *, content_type: str = "application/octet-stream") -> ArtifactInfo:
        """Store an object whole. Raises InvalidKey, StoreUnavailable."""
        ...

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises ArtifactNotFound, StoreUnavailable."""
        ...

    def open(self, key: str) -> BinaryIO:
        """The object as a stream that the caller closes. Raises ArtifactNotFound, StoreUnavailable."""
        ...

    def stat(self, key: str) -> ArtifactInfo:
        """What is known about the object. Raises ArtifactNotFound."""
        ...

    def list(self, prefix: str = "") -> Iterator[ArtifactInfo]:
        """The objects whose keys begin with `prefix`, by key. `sha256` may be empty."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens when there is none."""
        ...

    def delete_prefix(self, prefix: str) -> int:
        """Remove every object whose key begins with `prefix`, which must not be empty; how many there were."""
        ...

    def expire(self, prefix: str, older_than_s: float) -> int:
        """Remove the objects below `prefix` that were stored more than `older_than_s` seconds ago.

        How many there were.
        """
        ...

    def presign_get(self, key: str, *, expires_s: int = 900) -> str:
        """A URL that lets its holder read the object until it expires. Does not check that the object exists."""
        ...

    def presign_put(self, key: str, *, expires_s: int = 900) -> str:
        """A URL that lets its holder put the object once or more until it expires."""
        ...

    def ping(self) -> None:
        """Return if the store answers and can be written; raise StoreUnavailable otherwise."""
        ...
