"""The adapters that the contract suites run against. An adapter joins by adding a factory to one of these tables.

A factory takes a folder of its own and yields an adapter. Real servers come from tests.fixtures.servers.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from shared.bus.memory import MemoryBus
from shared.bus.port import Bus
from shared.jobs.memory import MemoryJobStore
from shared.jobs.port import JobStore
from shared.jobs.redis import RedisJobStore
from shared.jobs.sqlite import SqliteJobStore
from shared.store.folder import FolderStore
from shared.store.port import ArtifactStore
from tests.fixtures.servers import SelfServiceBus, shared_servers


@contextmanager
def memory_bus(_: Path) -> Iterator[Bus]:
    bus = MemoryBus()
    yield bus
    bus.close()


@contextmanager
def memory_jobs(_: Path) -> Iterator[JobStore]:
    yield MemoryJobStore()


@contextmanager
def sqlite_jobs(folder: Path) -> Iterator[JobStore]:
    jobs = SqliteJobStore(folder / "jobs.sqlite")
    yield jobs
    jobs.close()


@contextmanager
def folder_store(folder: Path) -> Iterator[ArtifactStore]:
    yield FolderStore(folder / "artifacts")


@contextmanager
def kafka_bus(_: Path) -> Iterator[Bus]:
    bus = SelfServiceBus(shared_servers().kafka)
    yield bus
    bus.close()


@contextmanager
def redis_jobs(_: Path) -> Iterator[JobStore]:
    jobs = RedisJobStore(shared_servers().redis, prefix=f"{uuid.uuid4().hex}:")
    yield jobs
    jobs.close()


@contextmanager
def s3_store(_: Path) -> Iterator[ArtifactStore]:
    yield shared_servers().s3


BUSES: dict[str, Callable[[Path], AbstractContextManager[Bus]]] = {"kafka": kafka_bus, "memory": memory_bus}
JOB_STORES: dict[str, Callable[[Path], AbstractContextManager[JobStore]]] = {
    "memory": memory_jobs,
    "redis": redis_jobs,
    "sqlite": sqlite_jobs,
}
STORES: dict[str, Callable[[Path], AbstractContextManager[ArtifactStore]]] = {"folder": folder_store, "s3": s3_store}


@pytest.fixture(params=sorted(BUSES))
def bus(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bus]:
    with BUSES[request.param](tmp_path) as adapter:
        yield adapter


@pytest.fixture(params=sorted(JOB_STORES))
def jobs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[JobStore]:
    with JOB_STORES[request.param](tmp_path) as adapter:
        yield adapter


@pytest.fixture(params=sorted(STORES))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ArtifactStore]:
    with STORES[request.param](tmp_path) as adapter:
        yield adapter
