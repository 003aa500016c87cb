"""One training run on disk: config, versions and data hashes, logs, exact resume, progress, and a clean stop.

A run folder holds config.json (with the hashes of the data), versions.json, log.jsonl, TensorBoard events, state.pt
(whatever was attached, the step and the random states; written whole or not at all) and, at the end, curves.png.
Metrics also go to OpenTelemetry. A run that was stopped or killed goes on from its last state as if nothing had been.
Knows nothing about models or objectives.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from opentelemetry import metrics as telemetry

from services.trainer.core.distributed import Group
from services.trainer.core.plots import draw_curves
from shared.errors import EditxError, UserError

STATE = "state.pt"
LOG = "log.jsonl"
_HOW_NOT_WHAT = {"device", "max_minutes", "save_every", "log_every", "sharding", "threads"}
"""Config entries that may change between a stop and a resume."""


class RunStopped(EditxError):
    """The run was stopped before its end; its state is saved and the same call goes on from it."""

    default_code = "training_stopped"


class Stateful(Protocol):
    """Anything that can be saved and restored."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> Any: ...


class Observer(Protocol):
    """Who watches a run: a bar on the terminal, a job on the bus."""

    def progress(self, fraction: float, note: str) -> None:
        """Called after every step."""
        ...

    def cancelled(self) -> bool:
        """Whether the run should save and stop."""
        ...

    def saved(self, folder: Path) -> None:
        """The run folder holds a new state."""
        ...


class Silent:
    """Nobody watches."""

    def progress(self, fraction: float, note: str) -> None:
        """Nothing."""

    def cancelled(self) -> bool:
        return False

    def saved(self, folder: Path) -> None:
        """Nothing."""


class Bar:
    """A progress bar on standard error."""

    def __init__(self, name: str) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=1.0, desc=name, bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}", file=sys.stderr
        )

    def progress(self, fraction: float, note: str) -> None:
        self._bar.n = fraction
        self._bar.set_postfix_str(note)

    def cancelled(self) -> bool:
        return False

    def saved(self, folder: Path) -> None:
        """Nothing to show."""


class TrainingRun:
    """The frame of a run. Use as a context manager around `for step in run.steps():`.

    Args:
        folder: made if missing. A folder of another config is refused.
        config: the stage's dataclass.
        total: planned number of optimizer steps.
        parts: what is saved and restored, by name.
        data: name to content hash of everything that is read.
    """

    def __init__(
        self, folder: Path, config: Any, total: int, parts: Mapping[str, Stateful], *, data: Mapping[str, str],
        group: Group | None = None, observer: Observer | None = None, save_every: int = 100, log_every: int = 10,
        max_minutes: float | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.total, self.step = folder, total, 0
        self.group = group or Group()
        self._parts, self._observer = dict(parts), observer or Silent()
        self._save_every, self._log_every = save_every, log_every
        self._until = time.monotonic() + max_minutes * 60 if max_minutes else math.inf
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._since, self._since_step = time.monotonic(), 0
        self._board: Any = None
        folder.mkdir(parents=True, exist_ok=True)
        self._claim(config, data)
        state = folder / STATE
        if state.exists():
            self._load(torch.load(state, map_location="cpu", weights_only=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()

    @property
    def is_done(self) -> bool:
        return self.step >= self.total

    def steps(self) -> Iterator[int]:
        """The steps still to do, from 0 or where the saved run stopped; raises RunStopped when it has to stop."""
        self._since_step = self.step
        while not self.is_done:
            cancelled = self.group.anywhere(self._observer.cancelled())
            if cancelled or self.group.anywhere(time.monotonic() > self._until):
                self.save()
                why = "was cancelled" if cancelled else "used up its minutes"
                raise RunStopped(f"The run {self.folder.name} {why} at step {self.step} of {self.total}.",
                                 "Start it again to go on.")  # fmt: skip
            yield self.step
        if self.group.is_main:
            draw_curves(self.folder / LOG, self.folder / "curves.png")

    def finish_step(self, metrics: Mapping[str, float]) -> None:
        """Count a step; log, save and report when due. Raises UserError on every process where one has a NaN."""
        wrong = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if self.group.anywhere(bool(wrong)):
            what = wrong[0] if wrong else "A number of another process is not finite"
            raise UserError(f"{what} at step {self.step} of {self.folder.name}.",
                            "The last saved state is from before: lower the learning rate, or look at the data.",
                            "training_diverged")  # fmt: skip
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        self.step += 1
        if self.step % self._log_every == 0 or self.is_done:
            self._log()
        if self.step % self._save_every == 0 or self.is_done:
            self.save()
        note = " ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:3])
        self._observer.progress(self.step / max(1, self.total), f"step {self.step}/{self.total} {note}")

    def save(self) -> None:
        """Write the state; a crash while writing leaves the old one. Every process must call."""
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        if self.group.is_main:
            rng: dict[str, Any] = {"torch": torch.get_rng_state()}
            if torch.cuda.is_available():
                rng["cuda"] = torch.cuda.get_rng_state()
            document = {"parts": parts, "step": self.step, "rng": rng, "sums": self._sums, "counts": self._counts}
            torch.save(document, self.folder / "state.partial")
            os.replace(self.folder / "state.partial", self.folder / STATE)
            self._observer.saved(self.folder)
        self.group.wait()

    def note(self, name: str, document: object) -> None:
        """Keep a JSON document with the run."""
        if self.group.is_main:
            write_json(self.folder / name, document)

    def _claim(self, config: Any, data: Mapping[str, str]) -> None:
        document = {"config": _plain(config), "data": dict(data), "total": self.total}
        path = self.folder / "config.json"
        if path.exists() and _essence(json.loads(path.read_text())) != _essence(document):
            raise UserError(f"The run folder {self.folder} belongs to another config or other data.",
                            "Choose another folder, or delete this one to start again.", "run_conflict")  # fmt: skip
        if self.group.is_main:
            write_json(path, document)
            write_json(self.folder / "versions.json", versions())

    def _load(self, saved: dict[str, Any]) -> None:
        for name, part in self._parts.items():
            part.load_state_dict(saved["parts"][name])
        self.step, self._sums, self._counts = saved["step"], saved["sums"], saved["counts"]
        torch.set_rng_state(saved["rng"]["torch"])
        if "cuda" in saved["rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved["rng"]["cuda"])
        self._drop_log_after(self.step)

    def _drop_log_after(self, step: int) -> None:
        """Lines of steps that were logged and not saved will be written again."""
        path = self.folder / LOG
        if self.group.is_main and path.exists():
            lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
            path.write_text("".join(f"{line}\n" for line in lines))

    def _log(self) -> None:
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        seconds = (time.monotonic() - self._since) / max(1, self.step - self._since_step)
        self._sums, self._counts, self._since, self._since_step = {}, {}, time.monotonic(), self.step
        if not self.group.is_main:
            return
        with (self.folder / LOG).open("a") as log:
            log.write(json.dumps({"step": self.step, **means, "s_per_step": round(seconds, 4)}) + "\n")
        gauge = telemetry.get_meter("editx.trainer").create_gauge(
            "editx.training", description="Metrics of training runs"
        )
        for name, value in means.items():
            gauge.set(value, {"run": self.folder.name, "metric": name})
        board = self._tensorboard()
        if board is not None:
            for name, value in means.items():
                board.add_scalar(name, value, self.step)

    def _tensorboard(self) -> Any:
        if self._board is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError:
                return None
            self._board = SummaryWriter(str(self.folder / "tensorboard"))
        return self._board


def read_log(folder: Path) -> list[dict[str, float]]:
    """The log lines of a run folder."""
    path = folder / LOG
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def versions() -> dict[str, str]:
    """What the numbers of a run depend on besides config and data."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
             "platform": platform.platform()}  # fmt: skip
    for package in ("editx", "peft"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def write_json(path: Path, document: object) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _plain(config: Any) -> Any:
    document = asdict(config) if is_dataclass(config) and not isinstance(config, type) else config
    return json.loads(json.dumps(document, default=str))


def _essence(document: Any) -> Any:
    """The document without what may change between a stop and a resume."""
    if isinstance(document, dict):
        return {k: _essence(v) for k, v in document.items() if k not in _HOW_NOT_WHAT}
    return document
