"""Artifacts as files below one folder: the embedded store.

A put writes a temporary file and renames it, so it is whole or absent.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.parse import quote, urlencode

from shared.errors import UserError
from shared.store.port import ArtifactInfo, ArtifactNotFound, InvalidKey, StoreUnavailable, check_key

BLOCK = 1 << 20
MOVES_MAX = 20
Method = Literal["GET", "PUT"]


class SignatureRefused(UserError):
    """The signature of a presigned URL is wrong or has expired."""

    default_code = "signature_refused"
    default_http_status = 403


class FolderStore:
    """An ArtifactStore in the folder `root`: objects/ holds the files, each with its type and hash in a hidden file
    beside it (keys never begin with a dot), tmp/ unfinished puts.

    Presigned URLs are `base_url`/{key} with an HMAC-SHA256 signature that `check_signature` verifies for whoever
    serves them; without `base_url` they are file: URLs for readers on this machine. `secret` keeps signatures valid
    across processes.
    """

    def __init__(
        self,
        root: Path,
        *,
        base_url: str | None = None,
        secret: bytes | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.root = root.resolve()
        self._objects, self._tmp = self.root / "objects", self.root / "tmp"
        self._base_url = (base_url or self._objects.as_uri()).rstrip("/")
        self._secret = secret or secrets.token_bytes(32)
        self._clock = clock
        try:
            for folder in (self._objects, self._tmp):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unavailable(self.root, error) from error

    def put(self, key: str, data: bytes | BinaryIO, *, content_type: str = "application/octet-stream") -> ArtifactInfo:
        target = self._path(key)
        digest, size = hashlib.sha256(), 0
        try:
            with _temporary(self._tmp) as (file, name):
                source = BytesIO(data) if isinstance(data, bytes) else data
                while block := source.read(BLOCK):
                    digest.update(block)
                    size += file.write(block)
                file.flush()
                os.fsync(file.fileno())
                facts = {"size": size, "sha256": digest.hexdigest(), "content_type": content_type}
                self._write_facts(key, facts)
                _below(target, lambda: os.replace(name, target))
        except (NotADirectoryError, IsADirectoryError, FileExistsError) as error:
            raise InvalidKey(f"{key} is a folder of other keys, or lies below an object.") from error
        except OSError as error:
            raise _unavailable(self.root, error) from error
        return ArtifactInfo(key, size, content_type, self._clock(), digest.hexdigest())

    def get(self, key: str) -> bytes:
        with self.open(key) as file:
            return file.read()

    def open(self, key: str) -> BinaryIO:
        try:
            return self._path(key).open("rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise _not_found(key) from error
        except OSError as error:
            raise _unavailable(self.root, error) from error

    def stat(self, key: str) -> ArtifactInfo:
        path = self._path(key)
        if not path.is_file():
            raise _not_found(key)
        return self._info(key, path)

    def list(self, prefix: str = "") -> Iterator[ArtifactInfo]:
        for key in sorted(self._keys(prefix)):
            with suppress(FileNotFoundError):
                yield self._info(key, self._objects / key)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
        with suppress(FileNotFoundError, NotADirectoryError):
            self._facts_path(key).unlink()
        _remove_empty(path.parent, self._objects)

    def delete_prefix(self, prefix: str) -> int:
        if not prefix:
            raise InvalidKey("Deleting everything needs a prefix.", "Name what should go, such as jobs/.")
        keys = self._keys(prefix)
        for key in keys:
            self.delete(key)
        return len(keys)

    def expire(self, prefix: str, older_than_s: float) -> int:
        limit = self._clock() - older_than_s
        old = [info.key for info in self.list(prefix) if info.modified_at <= limit]
        for key in old:
            self.delete(key)
        for path in self._tmp.iterdir():
            with suppress(FileNotFoundError):
                if path.stat().st_mtime <= limit:
                    path.unlink()
        return len(old)

    def presign_get(self, key: str, *, expires_s: int = 900) -> str:
        return self._presign("GET", key, expires_s)

    def presign_put(self, key: str, *, expires_s: int = 900) -> str:
        return self._presign("PUT", key, expires_s)

    def check_signature(self, method: Method, key: str, expires: str, signature: str) -> None:
        """Return if the query values of a presigned URL are right for a key. Raises SignatureRefused."""
        expected = self._signature(method, check_key(key), expires)
        if not hmac.compare_digest(expected, signature) or not expires.isdigit() or int(expires) < self._clock():
            raise SignatureRefused(f"The signature for {key} is wrong or has expired.", "Ask for a new URL.")

    def ping(self) -> None:
        try:
            with _temporary(self._tmp) as (file, name):
                file.write(b"ping")
            os.unlink(name)
        except OSError as error:
            raise _unavailable(self.root, error) from error

    def _presign(self, method: Method, key: str, expires_s: int) -> str:
        expires = str(int(self._clock()) + expires_s)
        query = urlencode({"expires": expires, "signature": self._signature(method, check_key(key), expires)})
        return f"{self._base_url}/{quote(key)}?{query}"

    def _signature(self, method: Method, key: str, expires: str) -> str:
        return hmac.new(self._secret, f"{method}\n{key}\n{expires}".encode(), hashlib.sha256).hexdigest()

    def _path(self, key: str) -> Path:
        return self._objects / check_key(key)

    def _facts_path(self, key: str) -> Path:
        path = self._path(key)
        return path.with_name(f".{path.name}.json")

    def _keys(self, prefix: str) -> set[str]:
        top = self._objects / Path(prefix).parent if "/" in prefix.rstrip("/") else self._objects
        found = (Path(folder, name) for folder, _, names in os.walk(top) for name in names if name[0] != ".")
        keys = (path.relative_to(self._objects).as_posix() for path in found)
        return {key for key in keys if key.startswith(prefix)}

    def _info(self, key: str, path: Path) -> ArtifactInfo:
        facts: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            facts = json.loads(self._facts_path(key).read_text())
        status = path.stat()
        same = facts.get("size") == status.st_size
        content_type = facts.get("content_type", "application/octet-stream")
        return ArtifactInfo(key, status.st_size, content_type, status.st_mtime, facts["sha256"] if same else "")

    def _write_facts(self, key: str, facts: dict[str, object]) -> None:
        """In place: facts that are torn by a crash count as none."""
        path, text = self._facts_path(key), json.dumps(facts)
        _below(path, lambda: path.write_text(text))


class _temporary:
    """A new file in `folder`, to be renamed; removed if that fails."""

    def __init__(self, folder: Path) -> None:
        descriptor, self._name = tempfile.mkstemp(dir=folder)
        self._file = os.fdopen(descriptor, "wb")

    def __enter__(self) -> tuple[BinaryIO, str]:
        return self._file, self._name

    def __exit__(self, failed: object, *_: object) -> None:
        self._file.close()
        if failed is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._name)


def _below(path: Path, write: Callable[[], object]) -> None:
    """Write to a path whose folder is made if need be, also while another thread removes it as empty."""
    for left in reversed(range(MOVES_MAX)):
        try:
            write()
            return
        except FileNotFoundError:
            if not left:
                raise
            with suppress(FileExistsError, FileNotFoundError):  # where the folder goes as mkdir looks
                path.parent.mkdir(parents=True, exist_ok=True)


def _remove_empty(folder: Path, top: Path) -> None:
    while folder != top:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


def _not_found(key: str) -> ArtifactNotFound:
    return ArtifactNotFound(f"There is no artifact {key}.")


def _unavailable(root: Path, error: OSError) -> StoreUnavailable:
    free = ""
    with suppress(OSError):
        free = f" {shutil.disk_usage(root).free // (1 << 20)} MiB are free there."
    return StoreUnavailable(f"The artifact folder {root} failed: {error}.{free}", "Check its disk and permissions.")
