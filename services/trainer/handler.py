"""The train step: one training job, with its state kept in the artifact store so that any worker can go on.

A saved state goes to the store each time; a worker that finds none in its own folder takes it from there. Knows no bus.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import time
from pathlib import Path

import torch

from services.trainer.core.runs import LOG, STATE, RunStopped
from services.trainer.jobs import Place, carry_out, parse_settings, publish
from services.trainer.settings import TrainerSettings
from shared.checkpoints.layout import checkpoints_home
from shared.errors import PermanentError
from shared.inference.port import RequestCancelled
from shared.schemas.route import StepKind
from shared.steps import StepContext
from shared.store.port import ArtifactNotFound, ArtifactStore

KEPT = ("config.json", "versions.json", STATE, LOG)
UPLOAD_EVERY_S = 30.0


class _Watcher:
    """A training run seen by its job: progress goes to the job, states to the store, cancellation back."""

    def __init__(self, step: StepContext, store: ArtifactStore, key: str) -> None:
        self._step, self._store, self._key = step, store, key
        self._uploaded_at = -UPLOAD_EVERY_S

    def progress(self, fraction: float, note: str) -> None:
        if not self._step.cancelled():
            self._step.progress(fraction, note)

    def cancelled(self) -> bool:
        return self._step.cancelled()

    def saved(self, folder: Path) -> None:
        """Keep the state for another worker, at most every half minute, and always when the run is told to stop."""
        if not self.cancelled() and time.monotonic() - self._uploaded_at < UPLOAD_EVERY_S:
            return
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name in KEPT:
                if (folder / name).exists():
                    archive.add(folder / name, name)
        self._store.put(self._key, packed.getvalue())
        self._uploaded_at = time.monotonic()


class TrainHandler:
    """Runs a recipe of services.trainer.jobs for one step."""

    kind: StepKind = "train"

    def __init__(self, store: ArtifactStore, settings: TrainerSettings | None = None) -> None:
        self._store = store
        self._settings = settings or TrainerSettings()

    def run(self, step: StepContext) -> None:
        """Train, measure, publish if the gate lets it; writes measures.json, log.jsonl and curves.png."""
        parameters = step.step.parameters
        settings = parse_settings(parameters["settings"])
        if self._settings.threads:
            torch.set_num_threads(self._settings.threads)
        folder = self._settings.runs / step.job.id
        key = f"training/{step.job.id}/state.tar"
        self._take_up(folder / "run", key)
        place = Place(folder, self._store, self._settings.device, _Watcher(step, self._store, key))
        try:
            measures = carry_out(str(parameters["recipe"]), settings, place)
        except RunStopped as stopped:
            step.check_cancelled()
            raise RequestCancelled(stopped.message) from stopped
        for name, value in measures.items():
            step.measure(name, value)
        step.write("measures.json", json.dumps(measures).encode(), "application/json")
        for name, content_type in ((LOG, "application/jsonl"), ("curves.png", "image/png")):
            if (folder / "run" / name).exists():
                step.write(name, (folder / "run" / name).read_bytes(), content_type)
        live = publish(settings, measures, folder, self._settings.publish or checkpoints_home())
        if live is not None:
            step.write("published.json", json.dumps({"name": live.name}).encode(), "application/json")
        self._store.delete(key)
        shutil.rmtree(folder, ignore_errors=True)

    def _take_up(self, folder: Path, key: str) -> None:
        """The state of another worker, if this one has none of its own."""
        if (folder / STATE).exists():
            return
        try:
            packed = self._store.get(key)
        except ArtifactNotFound:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            if {member.name for member in archive} - set(KEPT):
                raise PermanentError(f"The saved state {key} holds unexpected files.", "Delete it to start again.")
            archive.extractall(folder, filter="data")
