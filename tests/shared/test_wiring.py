"""One URL per port decides the adapter."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.bus.memory import MemoryBus
from shared.errors import UserError
from shared.inference.local import LocalInference
from shared.jobs.memory import MemoryJobStore
from shared.jobs.quota import MemoryQuota
from shared.jobs.sqlite import SqliteJobStore
from shared.store.folder import FolderStore
from shared.wiring import open_bus, open_inference, open_jobs, open_quota, open_store


def test_the_embedded_adapters_have_urls(tmp_path: Path) -> None:
    assert isinstance(open_bus("memory:"), MemoryBus)
    assert isinstance(open_jobs("memory:"), MemoryJobStore)
    assert isinstance(open_jobs(f"sqlite://{tmp_path}/jobs.sqlite"), SqliteJobStore)
    assert isinstance(open_quota("memory:"), MemoryQuota)
    assert isinstance(open_quota(f"sqlite://{tmp_path}/jobs.sqlite"), MemoryQuota)
    assert isinstance(open_store(f"file://{tmp_path}/store"), FolderStore)
    assert isinstance(open_inference("local:", {}), LocalInference)


@pytest.mark.parametrize("url", ["carrier-pigeon://loft", "redis://localhost", ""])
def test_a_url_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="bus"):
        open_bus(url)
