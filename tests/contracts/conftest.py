"""The adapters that the contract suites run against. An adapter joins by adding a factory to one of these tables.

A factory takes a folder of its own and yields an adapter; adapters that need a server are added by the module that
starts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from shared.bus.memory import MemoryBus
from shared.bus.port import Bus
from shared.jobs.memory import MemoryJobStore
from shared.jobs.port import JobStore
from shared.jobs.sqlite import SqliteJobStore
from shared.store.folder import FolderStore
from shared.store.port import ArtifactStore


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


BUSES: dict[str, Callable[[Path], AbstractContextManager[Bus]]] = {"memory": memory_bus}
JOB_STORES: dict[str, Callable[[Path], AbstractContextManager[JobStore]]] = {
    "memory": memory_jobs,
    "sqlite": sqlite_jobs,
}
STORES: dict[str, Callable[[Path], AbstractContextManager[ArtifactStore]]] = {"folder": folder_store}


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
