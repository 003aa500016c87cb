"""What every test can ask for: a complete tiny checkpoint."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a complete checkpoint with random weights. Shared by the session: copy it before changing it."""
    from tests.fixtures.tiny import tiny_checkpoint  # imports torch, which many tests need not wait for

    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
