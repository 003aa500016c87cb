"""Partitions: what is held back goes on afterwards, and only those who are cut off notice."""

from __future__ import annotations

import os
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from editx.stack.proxy import Proxy, ports_of


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while block := self.request.recv(1024):
            self.request.sendall(block)


@pytest.fixture
def proxy() -> Iterator[tuple[Proxy, int]]:
    """A proxy before a server that says everything back, and the port to speak to."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        proxy = Proxy(port, server.server_address[1])
        yield proxy, port
        proxy.close()
        server.shutdown()


def _call(port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), 5.0)
    client.settimeout(5.0)
    return client


def _says_nothing(client: socket.socket) -> bool:
    client.settimeout(0.2)
    try:
        return not client.recv(10)
    except TimeoutError:
        client.settimeout(5.0)
        return True


def test_everything_passes_both_ways(proxy: tuple[Proxy, int]) -> None:
    with _call(proxy[1]) as client:
        client.sendall(b"hello")
        assert client.recv(10) == b"hello"


def test_what_is_said_during_a_partition_arrives_after_it(proxy: tuple[Proxy, int]) -> None:
    with _call(proxy[1]) as before:
        before.sendall(b"one")
        assert before.recv(10) == b"one"
        proxy[0].cut()
        with _call(proxy[1]) as during:
            before.sendall(b"two")
            during.sendall(b"three")
            assert _says_nothing(before)
            assert _says_nothing(during)
            proxy[0].heal()
            assert before.recv(10) == b"two"
            assert during.recv(10) == b"three"


def test_only_the_processes_named_are_cut_off(proxy: tuple[Proxy, int]) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", _OTHER, str(proxy[1])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None
    assert other.stdout is not None
    with _call(proxy[1]) as mine:
        assert other.stdout.readline() == "connected\n"
        assert mine.getsockname()[1] in ports_of([os.getpid()])
        proxy[0].cut([os.getpid()])
        mine.sendall(b"mine")
        other.stdin.write("go\n")
        other.stdin.flush()
        assert other.stdout.readline() == "theirs\n"
        assert _says_nothing(mine)
        proxy[0].heal()
        assert mine.recv(10) == b"mine"
    assert other.wait(10) == 0


def test_a_server_that_is_away_ends_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        port, nobody = one.getsockname()[1], two.getsockname()[1]
    proxy = Proxy(port, nobody)
    with _call(port) as client:
        assert client.recv(10) == b""
    proxy.close()


_OTHER = """
import socket, sys
client = socket.create_connection(("127.0.0.1", int(sys.argv[1])), 5.0)
client.settimeout(5.0)
print("connected", flush=True)
sys.stdin.readline()
client.sendall(b"theirs")
print(client.recv(10).decode(), flush=True)
"""
