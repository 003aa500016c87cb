"""The two hubs that publish checkpoints: which files a repository holds at a commit, with sizes, hashes and addresses.

Lists only. Downloading, resuming and checking is `fetch.py`; what the files mean is `layout.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, ClassVar, Protocol

import httpx

from shared.errors import TransientError, UserError

HUGGING_FACE = "https://huggingface.co"
MODELSCOPE = "https://www.modelscope.cn"
LISTING_TIMEOUT_S = 30.0


class HubUnreachable(TransientError):
    """No answer from the hub: no network, a wrong endpoint, or the hub is down."""

    default_code = "hub_unreachable"


class RevisionNotFound(UserError):
    """The hub has no such repository or revision, or does not say which commit the revision is."""

    default_code = "revision_not_found"


@dataclass(frozen=True)
class RemoteFile:
    """One file at one commit. `sha256` is the hash of the content; `git_blob` is git's SHA-1 of header and content."""

    path: str
    size: int
    url: str
    sha256: str | None = None
    git_blob: str | None = None


@dataclass(frozen=True)
class Listing:
    """The files of a repository at the commit `revision`, and the request headers that fetch them."""

    revision: str
    files: tuple[RemoteFile, ...]
    headers: dict[str, str] = field(default_factory=dict)


class Hub(Protocol):
    """A place that serves repositories of files by commit."""

    name: ClassVar[str]
    endpoint: str

    def listing(self, repository: str, revision: str | None) -> Listing:
        """Resolve a revision (None: the newest) to a commit and list its files.

        Raises HubUnreachable, or RevisionNotFound for an unknown repository or revision.
        """
        ...


class HuggingFace:
    """huggingface.co or a mirror of it, listed through `huggingface_hub` (which finds the user's token)."""

    name: ClassVar[str] = "huggingface"

    def __init__(self, endpoint: str | None = None) -> None:
        from huggingface_hub.constants import ENDPOINT

        self.endpoint = (endpoint or ENDPOINT).rstrip("/")

    def listing(self, repository: str, revision: str | None) -> Listing:
        """See `Hub.listing`. Large files carry a sha256, small ones git's blob hash."""
        from huggingface_hub import HfApi, get_token, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError

        try:
            info = HfApi(endpoint=self.endpoint).model_info(
                repository, revision=revision, files_metadata=True, timeout=LISTING_TIMEOUT_S
            )
        except HfHubHTTPError as error:
            raise _refused(self.endpoint, repository, revision, error.response.status_code) from error
        except Exception as error:  # offline mode, or the errors of whichever HTTP client huggingface_hub brings
            raise HubUnreachable(f"Cannot reach {self.endpoint} ({_one_line(error)}).") from error
        if not info.sha:
            raise RevisionNotFound(f"{self.endpoint} does not name the commit of {repository} at {revision or 'main'}.")
        commit = info.sha
        files = tuple(
            RemoteFile(
                path=_safe(sibling.rfilename),
                size=sibling.size or 0,
                url=hf_hub_url(repository, sibling.rfilename, revision=commit, endpoint=self.endpoint),
                sha256=sibling.lfs.sha256 if sibling.lfs else None,
                git_blob=None if sibling.lfs else sibling.blob_id,
            )
            for sibling in info.siblings or []
        )
        token = get_token()
        return Listing(commit, files, {"Authorization": f"Bearer {token}"} if token else {})


class ModelScope:
    """modelscope.cn over its public HTTP interface. An unknown revision answers 200 with no file list."""

    name: ClassVar[str] = "modelscope"

    def __init__(self, endpoint: str | None = None) -> None:
        self.endpoint = (endpoint or MODELSCOPE).rstrip("/")

    def listing(self, repository: str, revision: str | None) -> Listing:
        """See `Hub.listing`. Every file carries a sha256."""
        url = f"{self.endpoint}/api/v1/models/{repository}/repo"
        asked = revision or "master"
        try:
            answer = httpx.get(
                f"{url}/files",
                params={"Revision": asked, "Recursive": "true"},
                timeout=LISTING_TIMEOUT_S,
                follow_redirects=True,
            )
        except (httpx.TransportError, OSError) as error:
            raise HubUnreachable(f"Cannot reach {self.endpoint} ({_one_line(error)}).") from error
        if answer.status_code != httpx.codes.OK:
            raise _refused(self.endpoint, repository, revision, answer.status_code)
        try:
            data: dict[str, Any] = answer.json().get("Data") or {}
        except ValueError as error:
            raise HubUnreachable(f"{self.endpoint} did not answer with a file list ({_one_line(error)}).") from error
        blobs = [entry for entry in data.get("Files") or [] if entry.get("Type") != "tree"]
        if not blobs:
            raise RevisionNotFound(f"{self.endpoint} has no files for {repository} at revision {asked}.")
        commit = self._commit(data, blobs, asked, repository)
        files = tuple(
            RemoteFile(
                path=_safe(entry["Path"]),
                size=int(entry.get("Size") or 0),
                url=str(httpx.URL(url, params={"Revision": commit, "FilePath": entry["Path"]})),
                sha256=entry.get("Sha256") or None,
            )
            for entry in blobs
        )
        return Listing(commit, files)

    def _commit(self, data: dict[str, Any], blobs: list[dict[str, Any]], asked: str, repository: str) -> str:
        if _is_commit(asked):
            return asked
        head = data.get("LatestCommitter") or {}
        short = str(head.get("ShortId") or "")
        candidates = [str(head.get("Id") or ""), *(str(blob.get("Revision") or "") for blob in blobs)]
        for candidate in candidates:
            if _is_commit(candidate) and (candidate.startswith(short) if short else candidate == candidates[0]):
                return candidate
        raise RevisionNotFound(
            f"{self.endpoint} does not name the commit of {repository} at {asked}.",
            "Give the commit hash that the repository's web page shows with --revision.",
        )


def hub(name: str, endpoint: str | None = None) -> Hub:
    """The hub called `huggingface` or `modelscope`, at its own address or at `endpoint` (a mirror)."""
    known: dict[str, type[HuggingFace] | type[ModelScope]] = {"huggingface": HuggingFace, "modelscope": ModelScope}
    if name not in known:
        raise UserError(f"No hub called '{name}'.", f"Choose one of: {', '.join(known)}.", "unknown_hub")
    return known[name](endpoint)


def _is_commit(revision: str) -> bool:
    return len(revision) == 40 and all(letter in "0123456789abcdef" for letter in revision)


def _safe(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path:
        raise UserError(f"The hub lists a file with an unsafe path: {path!r}.", "Nothing was written.", "unsafe_path")
    return path


def _refused(endpoint: str, repository: str, revision: str | None, status: int) -> TransientError | UserError:
    what = f"{repository} at revision {revision}" if revision else repository
    if status >= httpx.codes.INTERNAL_SERVER_ERROR or status == httpx.codes.TOO_MANY_REQUESTS:
        return HubUnreachable(f"{endpoint} answers {status} for {what}.")
    return RevisionNotFound(
        f"{endpoint} answers {status} for {what}.", "Check the revision; a private repository needs your HF_TOKEN."
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
