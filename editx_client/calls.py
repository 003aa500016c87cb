"""The gateway's calls as plain data, for both clients. Knows nothing about sockets or event loops."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

Source = str | Path | bytes | BinaryIO
"""A recording: a file's path, its bytes, or a binary stream."""

EVENTS_TIMEOUT_S = 60.0
MARGIN_S = 15.0


@dataclass(frozen=True)
class Call:
    """One HTTP call. `is_repeatable`: making it twice has the effect of once."""

    method: str
    path: str
    json: Any = None
    data: Mapping[str, str] | None = None
    files: Mapping[str, tuple[str, bytes]] | None = None
    content: bytes | None = None
    params: Mapping[str, str | int | Sequence[str]] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    is_repeatable: bool = True
    read_timeout_s: float | None = None

    def arguments(self) -> dict[str, Any]:
        """For httpx's request."""
        parts = {"json": self.json, "data": self.data, "files": self.files, "content": self.content}
        found: dict[str, Any] = {name: value for name, value in parts.items() if value is not None}
        return {**found, "params": self.params, "headers": dict(self.headers)}


def create_edit(
    source: Source | None,
    values: Mapping[str, Any],
    *,
    idempotency_key: str | None = None,
    wait_s: float = 0.0,
) -> Call:
    """POST /v1/audio/edits with a recording, or with `voice` or `upload_id` among the values."""
    headers = {"idempotency-key": idempotency_key or str(uuid.uuid4()), **_prefer(wait_s)}
    files = None if source is None else {"audio": ("audio", read(source))}
    return Call("POST", "/v1/audio/edits", data=flat(values), files=files, headers=headers,
                read_timeout_s=wait_s + MARGIN_S if wait_s else None)  # fmt: skip


def create_batch(edits: Sequence[Mapping[str, Any]], *, idempotency_key: str | None = None) -> Call:
    """POST /v1/batches; each edit names an `upload_id` or a `voice`."""
    headers = {"idempotency-key": idempotency_key or str(uuid.uuid4())}
    return Call("POST", "/v1/batches", json={"edits": [dict(edit) for edit in edits]}, headers=headers)


def batch(batch_id: str) -> Call:
    return Call("GET", _batch(batch_id))


def cancel_batch(batch_id: str) -> Call:
    return Call("POST", f"{_batch(batch_id)}/cancel")


def delete_batch(batch_id: str) -> Call:
    return Call("DELETE", _batch(batch_id))


def job(job_id: str, wait_s: float = 0.0) -> Call:
    return Call("GET", _job(job_id), headers=_prefer(wait_s), read_timeout_s=wait_s + MARGIN_S if wait_s else None)


def jobs(status: Sequence[str], limit: int, cursor: str | None) -> Call:
    params: dict[str, str | int | Sequence[str]] = {"limit": limit}
    if status:
        params["status"] = list(status)
    if cursor:
        params["cursor"] = cursor
    return Call("GET", "/v1/jobs", params=params)


def events(job_id: str, after: int) -> Call:
    headers = {"last-event-id": str(after), "accept": "text/event-stream"}
    return Call("GET", f"{_job(job_id)}/events", headers=headers, read_timeout_s=EVENTS_TIMEOUT_S)


def cancel(job_id: str) -> Call:
    return Call("POST", f"{_job(job_id)}/cancel")


def delete(job_id: str) -> Call:
    return Call("DELETE", _job(job_id))


def audio(job_id: str, iteration: int | None) -> Call:
    return Call("GET", f"{_job(job_id)}/audio", params={} if iteration is None else {"iteration": iteration})


def create_upload(size: int) -> Call:
    return Call("POST", "/v1/uploads", json={"bytes": size})


def create_voice(
    name: str,
    source: Source,
    text: str,
    *,
    consent_statement: str | None,
    consent_by: str | None,
    consent_recording: Source | None,
) -> Call:
    """POST /v1/audio/voices. Not repeatable: the second of two would find its name taken."""
    files = {"audio": ("audio", read(source))}
    if consent_recording is not None:
        files["consent_recording"] = ("consent", read(consent_recording))
    values = {"name": name, "text": text, "consent_statement": consent_statement, "consent_by": consent_by}
    return Call("POST", "/v1/audio/voices", data=flat(values), files=files, is_repeatable=False)


def voices() -> Call:
    return Call("GET", "/v1/audio/voices")


def remove_voice(voice: str) -> Call:
    return Call("DELETE", f"/v1/audio/voices/{quote(voice, safe='')}")


def speech(values: Mapping[str, Any]) -> Call:
    """POST /v1/audio/speech. Repeatable until it has answered."""
    body = {name: value for name, value in values.items() if value is not None}
    return Call("POST", "/v1/audio/speech", json=body, read_timeout_s=EVENTS_TIMEOUT_S)


def models() -> Call:
    return Call("GET", "/v1/models")


def options() -> Call:
    return Call("GET", "/v1/edits/options")


def read(source: Source) -> bytes:
    """The bytes of a recording."""
    if isinstance(source, bytes):
        return source
    if isinstance(source, str | Path):
        return Path(source).read_bytes()
    return source.read()


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Values as form fields: nested ones by dotted names, None left out."""
    fields: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            fields |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            fields[prefix + name] = "true" if value else "false"
        elif value is not None:
            fields[prefix + name] = str(value)
    return fields


def headers(api_key: str | None) -> dict[str, str]:
    """What every call carries."""
    return {"user-agent": "editx-client", **({"authorization": f"Bearer {api_key}"} if api_key else {})}


def _batch(batch_id: str) -> str:
    return f"/v1/batches/{quote(batch_id, safe='')}"


def _job(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _prefer(wait_s: float) -> dict[str, str]:
    return {"prefer": f"wait={int(wait_s)}"} if wait_s >= 1.0 else {}
