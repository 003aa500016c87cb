"""What is still to be told by webhook: one object per job in the artifact store, from before the job is accepted until
its end was told. Knows nothing about sending.
"""

from __future__ import annotations

import json

from shared.store.port import ArtifactStore

PREFIX = "webhooks/"


def outbox_key(job_id: str) -> str:
    """Where it lies that a job's end is to be told."""
    return f"{PREFIX}{job_id}.json"


def remember(store: ArtifactStore, job_id: str, attempts: int, next_at: float) -> None:
    """Keep that the job's end is to be told, after `attempts` attempts, at `next_at` (Unix seconds) or later."""
    record = json.dumps({"attempts": attempts, "next_at": next_at}).encode()
    store.put(outbox_key(job_id), record, content_type="application/json")


def recall(store: ArtifactStore, job_id: str) -> tuple[int, float]:
    """Attempts so far, and when the next is due. Raises ArtifactNotFound where nothing is to be told."""
    record = json.loads(store.get(outbox_key(job_id)))
    return int(record["attempts"]), float(record["next_at"])
