"""Servers that draw PPO's answers: new weights are written as versions and loaded by every server, one link apart.

A version is a checkpoint in the published layout below one folder that all servers see; `current` there is the link
that they load from (their EDITX_CHECKPOINT). A server answers with its old weights until the new ones are ready.
Knows nothing about sampling, and which kind of server it is only as a port.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from services.trainer.core.distributed import Group
from services.trainer.core.export import write_checkpoint
from services.trainer.ppo.rollouts import State
from shared.checkpoints.layout import Checkpoint
from shared.errors import TransientError
from shared.inference.port import InferenceUnavailable, Tensors, UnknownModel

log = logging.getLogger(__name__)

CURRENT = "current"
KEPT = 2


class Server(Protocol):
    """One server of the pool: the inference port, and loading a model anew."""

    def infer(self, model: str, inputs: Tensors, *, parameters: Mapping[str, Any] | None = None) -> Tensors: ...
    def load(self, model: str) -> None: ...
    def close(self) -> None: ...


class Pool:
    """Servers of the model "llm" whose weights are numbered versions of `base`.

    With `ahead` a version is loaded while the one before it draws, so that no server waits: answers are then up to one
    version old. Without it `deploy` returns when every server has the version. Of several processes the first deploys.
    """

    def __init__(
        self, servers: Sequence[Server], folder: Path, base: Checkpoint, *, ahead: bool = True,
        group: Group | None = None,
    ) -> None:  # fmt: skip
        self._servers, self._folder, self._base, self._ahead = list(servers), folder, base, ahead
        self._group = group or Group()
        self._versions: dict[int, int] = {}
        self._next = itertools.count()
        self._lock = threading.Lock()
        self._loader = ThreadPoolExecutor(1, "deploy")
        self._deploying: Future[None] | None = None

    def deploy(self, version: int, state: State) -> None:
        """Bring weights to the servers, after the version before has arrived. Raises TransientError when none takes it.

        `state` is asked at once: its weights may change after the return. Every process must call.
        """
        weights, is_first = state(), not self._versions
        if self._group.is_main:
            self._arrived()
            self._write(version, weights)
            self._deploying = self._loader.submit(self._load, version)
            if not self._ahead or is_first:
                self._arrived()
        self._group.wait()
        if not self._group.is_main:
            oldest = version - 1 if self._ahead and not is_first else version
            with self._lock:
                self._versions = dict.fromkeys(range(len(self._servers)), oldest)

    def deployed(self) -> int:
        """The oldest version that still answers. Raises TransientError when nobody does."""
        with self._lock:
            if not self._versions:
                raise _nobody()
            return min(self._versions.values())

    def infer(self, model: str, inputs: Tensors, *, parameters: Mapping[str, Any] | None = None) -> Tensors:
        """An answer by the next server in turn; one that does not serve is passed over until the next version."""
        while True:
            with self._lock:
                usable = sorted(self._versions)
            if not usable:
                raise _nobody()
            place = usable[next(self._next) % len(usable)]
            try:
                return self._servers[place].infer(model, inputs, parameters=parameters)
            except (InferenceUnavailable, UnknownModel) as error:
                log.warning("server %d of the pool is left out: %s", place, error)
                with self._lock:
                    self._versions.pop(place, None)

    def close(self) -> None:
        """Let go of the servers; they keep their last version."""
        self._loader.shutdown(wait=True)
        for server in self._servers:
            server.close()

    def _arrived(self) -> None:
        if self._deploying is not None:
            self._deploying.result()
            self._deploying = None

    def _write(self, version: int, state: Mapping[str, Tensor]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"v{version:06d}"
        facts = {"stage": "ppo rollouts", "version": version}
        write_checkpoint(self._base, self._folder / name, state, name=name, version=str(version), facts=facts)
        link = self._folder / f".{CURRENT}"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        os.replace(link, self._folder / CURRENT)
        for old in sorted(self._folder.glob("v*"), key=lambda path: path.stat().st_mtime_ns)[:-KEPT]:
            shutil.rmtree(old)

    def _load(self, version: int) -> None:
        def one(place: int) -> None:
            try:
                self._servers[place].load("llm")
            except InferenceUnavailable as error:
                log.warning("server %d of the pool did not take version %d: %s", place, version, error)
                with self._lock:
                    self._versions.pop(place, None)
                return
            with self._lock:
                self._versions[place] = version

        with ThreadPoolExecutor(len(self._servers)) as threads:
            list(threads.map(one, range(len(self._servers))))
        if not self._versions:
            raise TransientError(f"No server of the pool took version {version}.",
                                 f"They must run and have {self._folder / CURRENT} as EDITX_CHECKPOINT.")  # fmt: skip


def _nobody() -> TransientError:
    return TransientError("No server of the pool answers.", "Look at its servers; the run goes on when started again.")
