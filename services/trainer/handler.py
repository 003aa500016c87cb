"""The train step: one training job, whose state is kept so that any worker can go on. Knows no bus and no store."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import torch

from services.trainer.core.runs import LOG, RunStopped
from services.trainer.jobs import HELD_OUT_REPORT, Place, carry_out, parse_settings, publish
from services.trainer.live import put_live
from services.trainer.ppo.sources import local_rollouts, local_scorer, pool_models, pool_rollouts, pool_scorer
from services.trainer.ppo.trainer import CHECKS_PICTURE
from services.trainer.settings import TrainerSettings
from services.trainer.states import States
from shared.checkpoints.layout import checkpoints_home
from shared.inference.port import RequestCancelled
from shared.schemas.route import StepKind
from shared.steps import StepContext

KEEP_EVERY_S = 30.0


class _Watcher:
    """A training run seen by its job: progress goes to the job, states are kept, cancellation comes back."""

    def __init__(self, step: StepContext, states: States) -> None:
        self._step, self._states = step, states
        self._kept_at = -KEEP_EVERY_S

    def progress(self, fraction: float, note: str) -> None:
        if not self._step.cancelled():
            self._step.progress(fraction, note)

    def cancelled(self) -> bool:
        return self._step.cancelled()

    def saved(self, folder: Path) -> None:
        """Keep the state for another worker, at most every half minute, and always when the run is told to stop."""
        if self.cancelled() or time.monotonic() - self._kept_at >= KEEP_EVERY_S:
            self._states.keep(self._step.job.id, folder)
            self._kept_at = time.monotonic()


class TrainHandler:
    """Runs a recipe of services.trainer.jobs for one step."""

    kind: StepKind = "train"

    def __init__(self, states: States, settings: TrainerSettings | None = None) -> None:
        self._states = states
        self._settings = settings or TrainerSettings()

    def run(self, step: StepContext) -> None:
        """Train, measure, publish and put live if the gate lets it; writes the measures, the log and its curves."""
        parameters = step.step.parameters
        settings = parse_settings(parameters["settings"])
        if self._settings.threads:
            torch.set_num_threads(self._settings.threads)
        folder = self._settings.runs / step.job.id
        self._states.take_up(step.job.id, folder / "run")
        place = Place(
            folder, self._states.store, self._settings.device, _Watcher(step, self._states),
            {"local": local_rollouts, "pool": pool_rollouts(self._settings)},
            {"local": local_scorer, "pool": pool_scorer(self._settings)},
            pool_models(self._settings),
        )  # fmt: skip
        try:
            measures = carry_out(str(parameters["recipe"]), settings, place)
        except RunStopped as stopped:
            step.check_cancelled()
            raise RequestCancelled(stopped.message) from stopped
        for name, value in measures.items():
            step.measure(name, value)
        step.write("measures.json", json.dumps(measures).encode(), "application/json")
        kept = ((LOG, "application/jsonl"), ("curves.png", "image/png"), (HELD_OUT_REPORT, "application/json"),
                (CHECKS_PICTURE, "image/png"))  # fmt: skip
        for name, content_type in kept:
            if (folder / "run" / name).exists():
                step.write(name, (folder / "run" / name).read_bytes(), content_type)
        live = publish(settings, measures, folder, self._settings.publish or checkpoints_home())
        if live is not None:
            servers = put_live(self._settings, "reward" if parameters["recipe"] == "reward" else "llm")
            published = {"name": live.name, "servers": servers}
            step.write("published.json", json.dumps(published).encode(), "application/json")
        self._states.forget(step.job.id)
        shutil.rmtree(folder, ignore_errors=True)
