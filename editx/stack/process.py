"""One process of the local stack: started with a log file, waited for, signalled, and found again by its id.

Knows nothing about what the process does.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from shared.errors import TransientError

POLL_S = 0.05
SILENT_S = 5.0
"""How long a port may still answer after its process ended, before it counts as somebody else's."""
LISTENING = range(11_000, 20_900)
"""Where free_ports looks: below what systems give to outgoing connections, also 10,000 higher, where SeaweedFS speaks
gRPC."""
ATTEMPTS = 50
LOG_TAIL_LINES = 15


class NotReady(TransientError):
    """A process of the stack ended or did not answer in time."""

    default_code = "stack_not_ready"


@dataclass(frozen=True)
class Program:
    """How one process is started, when it is ready, and how long it may take to start and to end."""

    name: str
    command: tuple[str, ...]
    is_ready: Callable[[], bool]
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_s: float = 60.0
    stop_s: float = 35.0


@dataclass(frozen=True)
class Running:
    """A started process. `born` is its start time by the kernel, which tells it from a later one with the same id."""

    name: str
    pid: int
    born: str

    @property
    def is_alive(self) -> bool:
        """Whether this very process runs (or is stopped by a signal)."""
        fields = _stat(self.pid)
        return fields is not None and fields[19] == self.born and fields[0] != "Z"

    def send(self, number: signal.Signals) -> None:
        """Signal the process and what it started."""
        if self.is_alive:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)


def start(program: Program, log: Path) -> Running:
    """Start a program as the leader of a process group of its own, its output appended to `log`.

    Raises NotReady if something else answers already where it would: it could not listen there, and its users would
    take the other for it.
    """
    until = time.monotonic() + SILENT_S
    while _asked(program.is_ready):
        if time.monotonic() > until:
            raise NotReady(f"Something else answers already where {program.name} would.", "Take another port.")
        time.sleep(POLL_S)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        child = subprocess.Popen(
            program.command,
            env={**os.environ, **program.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    fields = _stat(child.pid)
    return Running(program.name, child.pid, fields[19] if fields else "")


def wait_ready(program: Program, running: Running, log: Path) -> None:
    """Return once the program answers. Raises NotReady with the end of its log."""
    until = time.monotonic() + program.ready_s
    while not _asked(program.is_ready):
        _reap(running.pid)
        if not running.is_alive or time.monotonic() > until:
            what = "ended" if not running.is_alive else f"did not answer within {program.ready_s:.0f} s"
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
            raise NotReady(f"{program.name} {what}. The end of {log}:\n{tail}", "Mend that and start the stack again.")
        time.sleep(POLL_S)


def stop(running: Running, patience_s: float) -> bool:
    """Ask a process to end and wait for it; kill it when it takes too long. Whether it ended by itself."""
    running.send(signal.SIGCONT)
    running.send(signal.SIGTERM)
    ended = wait_end(running, patience_s)
    if not ended:
        running.send(signal.SIGKILL)
        wait_end(running, 5.0)
    return ended


def wait_end(running: Running, patience_s: float) -> bool:
    """Whether the process ended within `patience_s` seconds."""
    until = time.monotonic() + patience_s
    while True:
        _reap(running.pid)
        if not running.is_alive:
            return True
        if time.monotonic() > until:
            return False
        time.sleep(POLL_S)


def answers_http(url: str) -> Callable[[], bool]:
    """A check that a URL answers with success."""

    def check() -> bool:
        with urllib.request.urlopen(url, timeout=2.0) as response:
            return 200 <= int(response.status) < 300

    return check


def accepts_connections(port: int) -> Callable[[], bool]:
    """A check that something listens on a port of this machine."""

    def check() -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=2.0):
            return True

    return check


def free_ports(number: int = 1) -> int:
    """The first of `number` ports in a row that nobody listens on now. Raises NotReady if there are none."""
    for _ in range(ATTEMPTS):
        first = random.randrange(LISTENING.start, LISTENING.stop - number)
        if all(_is_free(port) for port in range(first, first + number)):
            return first
    raise NotReady(f"No {number} free ports in a row were found from {LISTENING.start} to {LISTENING.stop}.")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _asked(check: Callable[[], bool]) -> bool:
    try:
        return check()
    except Exception:
        return False


def _reap(pid: int) -> None:
    """Take the exit status of a child, so that it does not linger; nothing happens for other processes."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the command's name: state first, start time at index 19."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
