"""What every test can ask for: a complete tiny checkpoint."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models of the tests are too small to share out


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a complete checkpoint with random weights. Shared by the session: copy it before changing it."""
    from tests.fixtures.tiny import tiny_checkpoint  # imports torch, which many tests need not wait for

    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session", autouse=True)
def _stop_servers() -> Iterator[None]:
    """End the real servers that tests of this session started, if any."""
    yield
    if loaded := sys.modules.get("tests.fixtures.servers"):
        loaded.stop_servers()
