"""From a URL to an adapter: which bus, store, job store or inference a process uses is one setting each.

Adapters are imported only when their URL is asked for. Knows nothing about services.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shared.bus.port import Bus
from shared.errors import MissingComponent, UserError
from shared.inference.local import ModelFactory
from shared.inference.port import Inference
from shared.jobs.port import JobStore
from shared.jobs.quota import MemoryQuota, Quota
from shared.store.port import ArtifactStore

CONNECTED = {
    "kafka": "shared.bus.kafka",
    "s3": "shared.store.s3",
    "s3+http": "shared.store.s3",
    "redis": "shared.jobs.redis",
    "rediss": "shared.jobs.redis",
    "triton": "shared.inference.triton",
}
"""URL scheme to the module whose `connect(url)` makes the adapter of a real server."""


def open_bus(url: str) -> Bus:
    """memory: or kafka://host:port[,host:port]"""
    if _scheme(url) == "memory":
        from shared.bus.memory import MemoryBus

        return MemoryBus()
    bus: Bus = _connect(url, "bus", ("kafka",))
    return bus


def open_store(url: str) -> ArtifactStore:
    """file:///folder or s3://key:secret@host:port/bucket (s3+http:// without TLS)"""
    if _scheme(url) == "file":
        from shared.store.folder import FolderStore

        return FolderStore(Path(urlsplit(url).path))
    store: ArtifactStore = _connect(url, "artifact store", ("s3", "s3+http"))
    return store


def open_jobs(url: str) -> JobStore:
    """memory:, sqlite:///file or redis://host:port/number"""
    if _scheme(url) == "memory":
        from shared.jobs.memory import MemoryJobStore

        return MemoryJobStore()
    if _scheme(url) == "sqlite":
        from shared.jobs.sqlite import SqliteJobStore

        return SqliteJobStore(Path(urlsplit(url).path))
    jobs: JobStore = _connect(url, "job store", ("redis", "rediss"))
    return jobs


def open_quota(url: str) -> Quota:
    """The call rates beside the job store of this URL: shared where it is Redis, else of this process alone."""
    if _scheme(url) in ("memory", "sqlite"):
        return MemoryQuota()
    quota: Quota = _connect(url, "job store", ("redis", "rediss"), module="shared.jobs.quota_redis")
    return quota


def open_inference(url: str, models: Mapping[str, ModelFactory], *, concurrent: Collection[str] = ()) -> Inference:
    """local: runs `models` in this process (see LocalInference); triton://host:port calls a server that serves them."""
    if _scheme(url) == "local":
        from shared.inference.local import LocalInference

        return LocalInference(models, concurrent=concurrent)
    inference: Inference = _connect(url, "inference", ("triton",))
    return inference


def _scheme(url: str) -> str:
    return url.split(":", 1)[0]


def _connect(url: str, port: str, schemes: tuple[str, ...], *, module: str | None = None) -> Any:
    scheme = _scheme(url)
    if scheme not in schemes:
        raise UserError(f"No {port} is known for {scheme}: URLs.", f"Known: {', '.join(schemes)}.", "unknown_adapter")
    try:
        adapter = importlib.import_module(module or CONNECTED[scheme])
    except ModuleNotFoundError as error:
        hint = "Install it with `pip install editx[stack]`."
        raise MissingComponent(f"The package {error.name}", f"the {port} {scheme}: needs it", hint) from error
    return adapter.connect(url)
