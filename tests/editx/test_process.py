"""Processes of the local stack: who listens where."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from editx.stack import process
from editx.stack.process import NotReady, Program, accepts_connections, free_ports


def test_ports_that_somebody_listens_on_are_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(process, "LISTENING", range(port - 1, port + 2))
        with pytest.raises(NotReady, match="No 2 free ports"):
            free_ports(2)


def test_free_ports_can_be_listened_on() -> None:
    first = free_ports(3)
    for port in range(first, first + 3):
        socket.create_server(("127.0.0.1", port)).close()


def test_a_server_is_not_taken_for_another_on_its_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "SILENT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as other:
        program = Program("broker", (sys.executable, "-c", ""), accepts_connections(other.getsockname()[1]))
        with pytest.raises(NotReady, match="Something else answers already where broker would"):
            process.start(program, tmp_path / "log")
    assert not (tmp_path / "log").exists()
