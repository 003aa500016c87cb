"""Batches: many jobs under one id. The record is a small object in the artifact store; the jobs are ordinary jobs.

With an idempotency key the batch's id follows from the key, and each job has a key of its own: a batch that was cut
off half way is completed by sending it again.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from services.gateway.access import Principal
from services.gateway.gateway import BATCHES, Gateway
from services.gateway.problems import NotFound
from services.gateway.schemas import BatchView
from services.gateway.submission import Submission, accept, discard, is_gone
from shared.errors import EditxError
from shared.jobs.port import IdempotencyConflict, JobNotFound
from shared.schemas import Job
from shared.store.port import ArtifactNotFound

BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")


def start(gateway: Gateway, principal: Principal, submissions: Sequence[Submission], key: str | None) -> BatchView:
    """Accept all jobs of a batch, none if one of them cannot be. Raises UserError, IdempotencyConflict, TooMuch."""
    for submission in submissions:
        submission.request(gateway.backend.metadata)
    prints = hashlib.sha256("".join(submission.fingerprint for submission in submissions).encode()).hexdigest()
    identity = (
        secrets.token_hex(16) if key is None else hashlib.sha256(f"{principal.id}/{key}".encode()).hexdigest()[:32]
    )
    batch_id, store = f"batch_{identity}", gateway.backend.store
    record_key = _key(principal.id, batch_id)
    known: dict[str, Any] | None = None
    if key is not None:
        with suppress(ArtifactNotFound):
            known = json.loads(store.get(record_key))
        if known is not None and known["fingerprint"] != prints:
            raise IdempotencyConflict(f"The idempotency key {key!r} was used before with another batch.",
                                      "Use a new key for a new request.")  # fmt: skip
    if known is None:
        gateway.admission.batch(principal, len(submissions))
    created: list[str] = []
    try:
        for number, submission in enumerate(submissions):
            created.append(accept(gateway, principal, submission, f"{batch_id}/{number}").job.id)
    except EditxError:
        if key is None:  # with one, sending the batch again completes it
            for job_id in created:
                discard(gateway, gateway.backend.jobs.get(job_id))
        raise
    record = {"fingerprint": prints, "created_at": gateway.backend.jobs.now(), "jobs": created}
    store.put(record_key, json.dumps(record).encode(), content_type="application/json")
    return look(gateway, principal, batch_id)


def look(gateway: Gateway, principal: Principal, batch_id: str) -> BatchView:
    """A batch as it stands. Raises NotFound."""
    record = _record(gateway, principal, batch_id)
    states = Counter("deleted" if job is None else job.state.value for job in _jobs(gateway, record["jobs"]))
    is_open = states["accepted"] + states["running"]
    return BatchView(
        id=batch_id,
        status="running" if is_open else "done",
        created_at=record["created_at"],
        counts=dict(states),
        jobs=record["jobs"],
    )


def open_jobs(gateway: Gateway, principal: Principal, batch_id: str) -> list[Job]:
    """The jobs of a batch that have not ended. Raises NotFound."""
    record = _record(gateway, principal, batch_id)
    return [job for job in _jobs(gateway, record["jobs"]) if job is not None and not job.is_terminal]


def remove(gateway: Gateway, principal: Principal, batch_id: str) -> list[Job]:
    """Forget a batch; its jobs, for the caller to delete. Raises NotFound."""
    record = _record(gateway, principal, batch_id)
    gateway.backend.store.delete(_key(principal.id, batch_id))
    return [job for job in _jobs(gateway, record["jobs"]) if job is not None]


def _jobs(gateway: Gateway, ids: list[str]) -> list[Job | None]:
    found: list[Job | None] = []
    for job_id in ids:
        try:
            job = gateway.backend.jobs.get(job_id)
        except JobNotFound:
            found.append(None)
        else:
            found.append(None if is_gone(job, gateway.backend.jobs.now()) else job)
    return found


def _record(gateway: Gateway, principal: Principal, batch_id: str) -> dict[str, Any]:
    if not BATCH_ID.fullmatch(batch_id):
        raise NotFound(f"There is no batch {batch_id}.", "", "batch_not_found")
    try:
        record: dict[str, Any] = json.loads(gateway.backend.store.get(_key(principal.id, batch_id)))
    except ArtifactNotFound as error:
        raise NotFound(f"There is no batch {batch_id}.", "", "batch_not_found") from error
    return record


def _key(owner: str, batch_id: str) -> str:
    return f"{BATCHES}{owner}/{batch_id}.json"
