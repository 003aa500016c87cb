"""A tiny checkpoint with random weights, made once for all tests of the command line and the API."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.tiny import tiny_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
