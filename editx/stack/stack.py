"""The local stack as one thing: which processes it has, in which order they start, and how to find them again.

`editx stack` is its command line. State lies in one folder: the data of the servers, a log per process, the spans of
all, and stack.json with the running processes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from editx.stack import process, servers
from editx.stack.models import SPECS, repository
from editx.stack.process import NotReady, Program, Running
from shared.bus.kafka import KafkaBus, connect
from shared.checkpoints.layout import Checkpoint
from shared.errors import UserError
from shared.jobs.redis import RedisJobStore
from shared.store.s3 import S3Store
from shared.topology import EXPIRE_DAYS, EXPIRING, SERVICES, topics

BUCKET = "editx"
BROKER_BUCKET = "broker"
FETCH_WAIT_MS = 20
"""Short, since Tansu answers a waiting fetch late; Apache Kafka answers at once and needs no such setting."""
IDLE_WAIT_MS = 100
"""Readers without work would otherwise ask all the time and take more than a core from the models."""
ORDER = ("store", "disk", "redis", "broker", "triton")
"""The servers as they start. The disk is an S3 server for the broker alone: that one keeps its records nowhere else."""
PORTS = {"store": 0, "redis": 10, "broker": 11, "triton": 21, "gateway": 30, "disk": 40}
"""How far above the stack's port each process listens. Triton by gRPC; HTTP is one below, its metrics one above."""
SPAN = 50
"""How many ports a stack has for itself."""
WORKERS = tuple(SERVICES)


@dataclass(frozen=True)
class Options:
    """What a stack consists of.

    `inference`: models behind Triton, inside each worker ("local"), or null models that do nothing. `workers` is the
    number of processes per service. The broker keeps records in a store of its own, or in its memory. With `detour`,
    clients come to ports that much higher, where somebody passes on what they say.
    """

    port: int = 18_000
    checkpoint: str = "nano"
    inference: Literal["triton", "local", "null"] = "triton"
    services: tuple[str, ...] = WORKERS
    workers: int = 1
    slots: int = 4
    gateway: bool = True
    broker_storage: Literal["store", "memory"] = "store"
    partitions: int = 8
    lease_s: float = 10.0
    session_timeout_ms: int = 6_000
    detour: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)


class Stack:
    """A stack in `folder`, whether it runs or not."""

    def __init__(self, folder: Path, options: Options | None = None) -> None:
        self.folder = folder.resolve()
        self._state = self.folder / "stack.json"
        known = json.loads(self._state.read_text()) if self._state.is_file() else {}
        if options is None:
            saved = known.get("options", {})
            options = Options(**{**saved, "services": tuple(saved.get("services", Options.services))})
        self.options = options
        self._running: dict[str, Running] = {
            name: Running(**facts) for name, facts in known.get("processes", {}).items()
        }

    # Where everything is.

    @property
    def urls(self) -> dict[str, str]:
        """The addresses of the stack, by the settings that name them."""
        at = {name: f"127.0.0.1:{port + self.options.detour}" for name, port in self.server_ports.items()}
        keys = f"{servers.ACCESS_KEY}:{servers.SECRET_KEY}"
        waits = (
            f"session_timeout_ms={self.options.session_timeout_ms}&heartbeat_interval_ms=500"
            f"&max_poll_interval_ms=60000&fetch_max_wait_ms={FETCH_WAIT_MS}&idle_wait_ms={IDLE_WAIT_MS}"
        )
        return {
            "EDITX_BUS_URL": f"kafka://{at['broker']}?{waits}",
            "EDITX_STORE_URL": f"s3+http://{keys}@{at['store']}/{BUCKET}",
            "EDITX_JOBS_URL": f"redis://{at['redis']}/0",
            "EDITX_INFERENCE_URL": f"triton://{at['triton']}" if "triton" in at else "local:",
            "EDITX_PUBLIC_URL": f"http://127.0.0.1:{self._port('gateway')}",
        }

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every process of ours."""
        return {
            **self.urls,
            "EDITX_CHECKPOINT": self.options.checkpoint,
            "EDITX_SLOTS": str(self.options.slots),
            "EDITX_LEASE_S": str(self.options.lease_s),
            "EDITX_DRAIN_S": "20",
            "EDITX_SPANS_FILE": str(self.spans_file),
            "EDITX_PORT": str(self._port("gateway")),
            "EDITX_TRAINER_RUNS": str(self.folder / "training"),
            "EDITX_TRAINER_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(servers.ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            **self.options.settings,
        }

    @property
    def spans_file(self) -> Path:
        """Where every process appends its spans."""
        return self.folder / "spans.jsonl"

    def log(self, name: str) -> Path:
        """The log of a process."""
        return self.folder / "logs" / f"{name}.log"

    @property
    def server_ports(self) -> dict[str, int]:
        """Where each server listens that the workers speak to."""
        spoken_to = [name for name in ORDER if name != "disk" and name in self.names()]
        return {name: self._port(name) for name in spoken_to}

    def store(self) -> S3Store:
        """A client of the stack's artifact store."""
        return self._bucket(BUCKET, "store")

    def bus(self) -> KafkaBus:
        """A client of the stack's broker."""
        return connect(self.urls["EDITX_BUS_URL"])

    def jobs(self) -> RedisJobStore:
        """A client of the stack's job store."""
        return RedisJobStore(self.urls["EDITX_JOBS_URL"])

    # What it consists of.

    def program(self, name: str) -> Program:
        """How the process `name` is started."""
        data = self.folder / "data"
        if name in ("store", "disk"):
            return servers.object_store(self._port(name), data / name, name)
        if name == "redis":
            return servers.redis(self._port(name), data / name)
        if name == "broker":
            return self._broker(self._port(name))
        if name == "triton":
            served = self._served
            models, folders = [SPECS[service].name for service in served], [repository(service) for service in served]
            return servers.triton(
                self._port(name) - 1, folders, self.folder, {**self.environment, "EDITX_INFERENCE_URL": ""}, models
            )
        if name == "gateway":
            command = (sys.executable, "-c", _GATEWAY)
            ready = process.answers_http(f"http://127.0.0.1:{self._port(name)}/healthz")
            return Program(name, command, ready, self.environment)
        return self._worker(name)

    def names(self) -> list[str]:
        """All processes, in the order in which they start."""
        workers = [f"{service}-{number}" for service in self.options.services for number in range(self.options.workers)]
        left_out = {
            "triton": self.options.inference != "triton",
            "disk": self.options.broker_storage == "memory",
        }
        servers_ = [name for name in ORDER if not left_out.get(name)]
        return [*servers_, *workers, "intake", *(["gateway"] if self.options.gateway else [])]

    # Starting, stopping, looking.

    def up(self) -> None:
        """Start everything that does not run yet, and return when all of it answers. Raises NotReady."""
        self.folder.mkdir(parents=True, exist_ok=True)
        names = self.names()
        self._start_all([name for name in names if name in ("store", "disk")])
        self.store().create_bucket(dict.fromkeys(EXPIRING, EXPIRE_DAYS))
        if "disk" in names:
            self._bucket(BROKER_BUCKET, "disk").create_bucket()
        self._start_all([name for name in names if name in ("redis", "broker")])
        bus = self.bus()
        bus.create_topics(topics(self.options.partitions))
        bus.close()
        self._start_all([name for name in names if name == "triton"])
        self._start_all([name for name in names if name not in ORDER])

    def down(self) -> dict[str, bool]:
        """Stop everything, users first; by name, whether it ended by itself."""
        ours = [name for name in self._running if name not in ORDER]
        with ThreadPoolExecutor(max(len(ours), 1)) as pool:
            ended = dict(zip(ours, pool.map(self._stop, ours), strict=True))
        ended |= {name: self._stop(name) for name in reversed(ORDER) if name in self._running}
        self._running.clear()
        self._save()
        return ended

    def start(self, name: str) -> None:
        """Start one process and return when it answers. Raises NotReady."""
        self._start_all([name])

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to one process."""
        self._found(name).send(number)

    def restart(self, name: str, *, kill: bool = False) -> None:
        """Stop (or kill) one process and start it again."""
        if kill:
            self._found(name).send(signal.SIGKILL)
            process.wait_end(self._found(name), 5.0)
        else:
            self._stop(name)
        self.start(name)

    def pids(self) -> dict[str, int]:
        """The process id of everything that runs, by name."""
        return {name: running.pid for name, running in self._running.items() if running.is_alive}

    def status(self) -> dict[str, str]:
        """Every process: "running", "not answering" or "stopped"."""
        return {name: self._state_of(name) for name in dict.fromkeys([*self.names(), *self._running])}

    def _state_of(self, name: str) -> str:
        running = self._running.get(name)
        if running is None or not running.is_alive:
            return "stopped"
        try:
            return "running" if self.program(name).is_ready() else "not answering"
        except Exception:
            return "not answering"

    def _start_all(self, names: Sequence[str]) -> None:
        wanted = [name for name in names if not (name in self._running and self._running[name].is_alive)]
        programs = {name: self.program(name) for name in wanted}
        for name, program in programs.items():
            _alive_file(self.folder, name).unlink(missing_ok=True)
            self._running[name] = process.start(program, self.log(name))
            self._save()
        for name, program in programs.items():
            process.wait_ready(program, self._running[name], self.log(name))

    def _stop(self, name: str) -> bool:
        return process.stop(self._running[name], self.program(name).stop_s)

    def _found(self, name: str) -> Running:
        if name not in self._running:
            raise UserError(
                f"There is no process {name!r} in {self.folder}.", f"There are: {', '.join(self._running)}."
            )
        return self._running[name]

    def _save(self) -> None:
        facts = {
            "options": asdict(self.options),
            "processes": {name: asdict(one) for name, one in self._running.items()},
        }
        temporary = self._state.with_suffix(".tmp")
        temporary.write_text(json.dumps(facts, indent=1))
        temporary.replace(self._state)

    @property
    def _served(self) -> list[str]:
        """The services whose models the checkpoint has; only the reward model may be missing."""
        has_reward = Checkpoint.resolve(self.options.checkpoint).has_reward
        return [
            service for service in self.options.services if service in SPECS and (service != "reward" or has_reward)
        ]

    def _broker(self, port: int) -> Program:
        advertised = port + self.options.detour
        if self.options.broker_storage == "memory":
            return servers.broker(port, advertised=advertised)
        store = {
            "AWS_ACCESS_KEY_ID": servers.ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": servers.SECRET_KEY,
            "AWS_ENDPOINT": f"http://127.0.0.1:{self._port('disk')}", "AWS_ALLOW_HTTP": "true",
            "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        return servers.broker(port, f"s3://{BROKER_BUCKET}/", store, advertised=advertised)

    def _worker(self, name: str) -> Program:
        service = name.rpartition("-")[0] or name
        module = (
            ["editx.stack.null", service]
            if self.options.inference == "null" and service in SPECS
            else [f"services.{service}.worker"]
        )
        alive = _alive_file(self.folder, name)
        environment = {**self.environment, "EDITX_ALIVE_FILE": str(alive)}
        return Program(name, (sys.executable, "-m", *module), alive.is_file, environment, ready_s=90.0)

    def _port(self, name: str) -> int:
        return self.options.port + PORTS[name]

    def _bucket(self, bucket: str, server: str) -> S3Store:
        return S3Store(f"127.0.0.1:{self._port(server)}", bucket, access_key=servers.ACCESS_KEY,
                       secret_key=servers.SECRET_KEY, secure=False)  # fmt: skip


_GATEWAY = """
from editx.serving import serve_hosted
from services.gateway.settings import GatewaySettings
serve_hosted(GatewaySettings())
"""


def _alive_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.alive"


__all__ = ["SPAN", "NotReady", "Options", "Stack"]
