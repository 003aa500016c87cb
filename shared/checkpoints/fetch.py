"""Fetch a published checkpoint: pinned to a commit, resumable, every file checked before it takes its place.

A lock file beside the files holds the commits, so that an interrupted or repeated fetch gets the same files.
Knows hubs and files; knows nothing about what is in them (`verify.py` does).
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from pydantic import BaseModel, ValidationError

from shared.checkpoints import manifest
from shared.checkpoints.hubs import Hub, HubUnreachable, Listing, RemoteFile, hub
from shared.checkpoints.layout import EDITX_FOLDER, TOKENIZER_FOLDER, checkpoints_home
from shared.errors import PermanentError, UserError, reasons

LOCK_FILE = "editx.lock.json"
UNWANTED = ("*.py", ".git*", "*/example/*", "example/*", "assets/*")
CHUNK_BYTES = 1 << 20
MAX_FAILURES = 5
TIMEOUT = httpx.Timeout(60.0, connect=10.0)

Progress = Callable[[str, int, int], None]
"""Called with a file's path, the bytes that are here and the bytes that it has."""


@dataclass(frozen=True)
class Part:
    """One repository of a release. `revisions` holds a pinned commit by hub; without one the newest is locked.

    `sha256` holds the hashes of files that are known beforehand, by path.
    """

    folder: str
    repository: str
    revisions: dict[str, str]
    sha256: dict[str, str] = field(default_factory=dict)


def _release(weights: str) -> tuple[Part, ...]:
    return (
        Part(EDITX_FOLDER, "stepfun-ai/Step-Audio-EditX", {"huggingface": weights}, {SPEAKER_FILE: SPEAKER_SHA256}),
        Part(TOKENIZER_FOLDER, "stepfun-ai/Step-Audio-Tokenizer", {"huggingface": TOKENIZER_COMMIT}),
    )


# The repositories carry no tags. The commits are those that diodiogod/TTS-Audio-Suite pins on Hugging Face for its
# "2026-01-23" and "2025-11-28" checkpoints and their tokenizer. Nobody is known to name one on ModelScope: there, a
# first fetch resolves the newest commit and writes it to the lock file. The speaker encoder is CosyVoice's.
TOKENIZER_COMMIT = "af7e5a3ec06175a7facae9d4100073d6e4dbb36c"
SPEAKER_FILE = "CosyVoice-300M-25Hz/campplus.onnx"
SPEAKER_SHA256 = "a6ac6a63997761ae2997373e2ee1c47040854b4b759ea41ec48e4e42df0f4d73"
RELEASES: dict[str, tuple[Part, ...]] = {
    "official": _release("5fe2f8a05c2353301ad47d3c1747b262115da138"),
    "official-2025-11": _release("7f3de603ae46c96dff6f06f47b1d5a45aabd34fe"),
}


class HashMismatch(PermanentError):
    """A downloaded file is not what the hub lists; it was removed."""

    default_code = "hash_mismatch"


class Locked(BaseModel):
    """One repository at one commit."""

    repository: str
    revision: str


class Lock(BaseModel):
    """The lock file: from which hub, and each folder's repository and commit."""

    hub: str
    endpoint: str
    folders: dict[str, Locked]


def fetch(
    release: str,
    target: Path | None = None,
    *,
    source: str = "huggingface",
    endpoint: str | None = None,
    revision: str | None = None,
    update: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Download a release into `target` (default: its name in the checkpoints folder) and return that folder.

    Takes the commits of the lock file when there is one, else the pinned ones, and with `update` the newest;
    `revision` names the commit of the language model's repository. Raises UserError (unknown release, disk full,
    another hub locked), HubUnreachable with the place where the files can be put by hand, or HashMismatch.
    """
    if release not in RELEASES:
        raise UserError(f"No release called '{release}'.", f"Known: {', '.join(RELEASES)}.", "unknown_release")
    target = (target or checkpoints_home() / release).expanduser()
    chosen = hub(source, endpoint)
    parts = RELEASES[release]
    with _say_where_to_put_files(parts, target):
        listings = _resolve(parts, chosen, target, revision, update)
        _check_disk(listings, target)
        digests: dict[str, str] = {}
        with httpx.Client(follow_redirects=True, timeout=TIMEOUT) as client:
            for part, listing in listings:
                for remote in listing.files:
                    path = target / part.folder / remote.path
                    digest = download(client, remote, path, headers=listing.headers, progress=progress)
                    digests[f"{part.folder}/{remote.path}"] = digest
    manifest.write(target, digests)
    return target


def _resolve(
    parts: tuple[Part, ...], chosen: Hub, target: Path, revision: str | None, update: bool
) -> list[tuple[Part, Listing]]:
    lock = None if update else read_lock(target)
    if lock is not None and lock.hub != chosen.name:
        raise UserError(
            f"{target} was begun from {lock.hub}, whose commits differ from those of {chosen.name}.",
            f"Use --from {lock.hub}, another folder, or --update.",
            "locked_to_other_hub",
        )
    listings = []
    for number, part in enumerate(parts):
        wanted = revision if number == 0 and revision else None
        if wanted is None and lock is not None and part.folder in lock.folders:
            wanted = lock.folders[part.folder].revision
        if wanted is None and not update:
            wanted = part.revisions.get(chosen.name)
        listing = chosen.listing(part.repository, wanted)
        _check_known_hashes(part, listing)
        kept = [file for file in listing.files if not any(fnmatch.fnmatch(file.path, pattern) for pattern in UNWANTED)]
        listings.append((part, Listing(listing.revision, tuple(kept), listing.headers)))
    folders = {part.folder: Locked(repository=part.repository, revision=found.revision) for part, found in listings}
    target.mkdir(parents=True, exist_ok=True)
    content = Lock(hub=chosen.name, endpoint=chosen.endpoint, folders=folders).model_dump_json(indent=2)
    _replace_text(target / LOCK_FILE, content + "\n")
    return listings


def _check_known_hashes(part: Part, listing: Listing) -> None:
    for file in listing.files:
        known = part.sha256.get(file.path)
        if known is not None and file.sha256 is not None and file.sha256 != known:
            raise HashMismatch(
                f"{part.repository} lists {file.path} with sha256 {file.sha256}; the release has {known}.",
                "Nothing was downloaded. The mirror serves another file, or the repository has changed: compare them.",
            )


def read_lock(target: Path) -> Lock | None:
    """The lock file of a fetched checkpoint, None where there is none. Raises UserError when it is not readable."""
    path = target / LOCK_FILE
    if not path.is_file():
        return None
    try:
        return Lock.model_validate_json(path.read_bytes())
    except ValidationError as error:
        message = f"{path} is not a lock file: {reasons(error)}."
        raise UserError(message, "Remove it and fetch again.", "lock_invalid") from error


def download(
    client: httpx.Client,
    remote: RemoteFile,
    target: Path,
    *,
    headers: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> str:
    """Bring one file here, continuing what an earlier call left, and return its sha256.

    Bytes gather in `<name>.part`; the file takes its name only when size and hash are right. A lost connection is
    tried again from where it stopped, until it fails MAX_FAILURES times in a row without a new byte.
    """
    report = progress or (lambda *_: None)
    if target.is_file() and target.stat().st_size == remote.size:
        digest, git_blob = _digests(target)
        if _matches(remote, digest, git_blob):
            report(remote.path, remote.size, remote.size)
            return digest
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    if _size(part) > remote.size:
        part.unlink()
    failures = 0
    while (have := _size(part)) < remote.size:
        try:
            for done in _continue(client, remote, part, max(have, 0), headers or {}):
                report(remote.path, done, remote.size)
        except httpx.TransportError as error:
            grown = _size(part) > max(have, 0)
            failures = 0 if grown else failures + 1
            if failures >= MAX_FAILURES:
                reason = str(error) or type(error).__name__
                raise HubUnreachable(f"The transfer of {remote.path} broke ({reason}).") from error
            time.sleep(0.1 if grown else 2.0**failures / 4)
    digest, git_blob = _digests(part)
    if have != remote.size or not _matches(remote, digest, git_blob):
        part.unlink()
        listed = remote.sha256 or f"git blob {remote.git_blob}"
        raise HashMismatch(
            f"{target} arrived with {have} bytes and sha256 {digest}; the hub lists {remote.size} bytes and {listed}.",
            "The file was removed. Fetch again; if it repeats, the mirror serves another file.",
        )
    os.replace(part, target)
    report(remote.path, remote.size, remote.size)
    return digest


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _continue(
    client: httpx.Client, remote: RemoteFile, part: Path, have: int, headers: dict[str, str]
) -> Iterator[int]:
    """Append to `part` from byte `have`; a server that ignores ranges starts it over. Yields the bytes here so far."""
    asked = {**headers, "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with client.stream("GET", remote.url, headers=asked) as answer:
        if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink(missing_ok=True)
            raise httpx.ReadError("the server cannot continue the file; it starts over")
        if answer.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
            raise httpx.ReadError(f"the server answers {answer.status_code}")
        if answer.status_code not in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
            raise UserError(
                f"{remote.url} answers {answer.status_code}.",
                "Check the revision; a private repository needs your HF_TOKEN.",
                "download_refused",
            )
        resumed = answer.status_code == httpx.codes.PARTIAL_CONTENT and have > 0
        done = have if resumed else 0
        with part.open("ab" if resumed else "wb") as file:
            for chunk in answer.iter_raw(CHUNK_BYTES):
                file.write(chunk)
                done += len(chunk)
                yield done
    if done < remote.size:
        raise httpx.ReadError(f"the connection closed after {done} of {remote.size} bytes")


def _digests(path: Path) -> tuple[str, str]:
    """SHA-256 of the content, and git's blob hash (SHA-1 of a header and the content)."""
    sha256 = hashlib.sha256()
    git_blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
            git_blob.update(chunk)
    return sha256.hexdigest(), git_blob.hexdigest()


def _matches(remote: RemoteFile, digest: str, git_blob: str) -> bool:
    if remote.sha256 is not None:
        return remote.sha256 == digest
    return remote.git_blob is None or remote.git_blob == git_blob


def _check_disk(listings: list[tuple[Part, Listing]], target: Path) -> None:
    missing = 0
    for part, listing in listings:
        for remote in listing.files:
            path = target / part.folder / remote.path
            here = max(_size(path), _size(path.with_name(path.name + ".part")), 0)
            missing += max(0, remote.size - here)
    free = shutil.disk_usage(target).free
    if missing > free:
        raise UserError(
            f"{target} needs {missing / 1e9:.2f} GB more, and {free / 1e9:.2f} GB are free.",
            "Free some space, or fetch to another disk with --to.",
            "disk_full",
        )


@contextmanager
def _say_where_to_put_files(parts: tuple[Part, ...], target: Path) -> Iterator[None]:
    try:
        yield
    except HubUnreachable as error:
        places = " and ".join(f"those of {part.repository} into {target / part.folder}" for part in parts)
        error.message += f" Without a network, put the files there by hand: {places}."
        raise


def _replace_text(path: Path, content: str) -> None:
    begun = path.with_name(path.name + ".part")
    begun.write_text(content, encoding="utf-8")
    os.replace(begun, path)
