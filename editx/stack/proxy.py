"""Network partitions on one machine: a TCP proxy before a server that can hold back what some processes say and hear.

What is held back stays in the sockets and goes on when the partition ends, as packets do that are sent again; so a
process that was cut off acts on old news. Knows nothing about what goes through.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 1 << 16
CONNECT_S = 5.0
EVERYBODY = frozenset({0})
"""Stands for every client."""


@dataclass(eq=False)
class _Connection:
    """A client's connection and the one to the server; `port` is the client's, by which its process is found."""

    client: socket.socket
    server: socket.socket
    port: int
    open: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        for end in (self.client, self.server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class Proxy:
    """Listens on `port` of this machine and passes everything to `target` and back, except for who is cut off."""

    def __init__(self, port: int, target: int) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._cut: frozenset[int] = frozenset()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=128)
        threading.Thread(target=self._accept, name=f"proxy-{port}", daemon=True).start()

    def cut(self, pids: Iterable[int] = EVERYBODY) -> None:
        """Hold back everything to and from these processes, on connections that are there and on new ones."""
        with self._lock:
            self._cut = frozenset(pids)
            for connection in self._connections:
                if self._is_cut(connection):
                    connection.open.clear()

    def heal(self) -> None:
        """Let everything through again, what was held back first."""
        with self._lock:
            self._cut = frozenset()
            for connection in self._connections:
                connection.open.set()

    def close(self) -> None:
        """Stop listening and close every connection."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.heal()
        for connection in list(self._connections):
            connection.close()

    def _is_cut(self, connection: _Connection) -> bool:
        if self._cut == EVERYBODY:
            return True
        return bool(self._cut) and connection.port in ports_of(self._cut)

    def _accept(self) -> None:
        while True:
            try:
                client, (_, port) = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target), CONNECT_S)
            except OSError:
                client.close()
                continue
            for end in (client, server):
                end.settimeout(None)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection(client, server, port)
            with self._lock:
                self._connections.add(connection)
                if not self._is_cut(connection):
                    connection.open.set()
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(connection, source, sink), daemon=True).start()

    def _pass(self, connection: _Connection, source: socket.socket, sink: socket.socket) -> None:
        """Pass one direction on until either end closes."""
        try:
            while block := source.recv(BLOCK):
                connection.open.wait()
                sink.sendall(block)
        except OSError:
            pass
        connection.open.wait()
        connection.close()
        with self._lock:
            self._connections.discard(connection)


def ports_of(pids: Collection[int]) -> set[int]:
    """The local TCP ports of some processes, as the kernel lists them."""
    sockets = set()
    for pid in pids:
        with suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    sockets.add(os.readlink(entry.path))
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return {int(fields[1].rpartition(":")[2], 16) for fields in lines if f"socket:[{fields[9]}]" in sockets}
