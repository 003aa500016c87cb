"""The folder of one post-training: data sets, judges, references, checkpoints, and which stages are done.

It is all that a stage needs besides the material, so it can be carried to another machine between stages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from services.trainer.core.runs import write_json
from services.trainer.data.manifest import Dataset
from services.trainer.data.rows import Row
from services.trainer.evaluate.acoustic import Vector, features
from services.trainer.evaluate.runner import at_16k
from services.trainer.evaluate.system import PortSystem
from shared.artifacts import Tokenized
from shared.audio.io import Waveform
from shared.errors import UserError


class Workplace:
    """Reads and writes below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("datasets", "references", "stages", "runs", "checkpoints"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def is_done(self, stage: str) -> bool:
        return (self.root / "stages" / f"{stage}.json").exists()

    def finish(self, stage: str, summary: dict[str, Any]) -> None:
        """Mark a stage as done, with its numbers."""
        write_json(self.root / "stages" / f"{stage}.json", summary)

    def summary(self, stage: str) -> dict[str, Any]:
        """The numbers of a finished stage. Raises UserError for one that is not."""
        path = self.root / "stages" / f"{stage}.json"
        if not path.exists():
            raise UserError(
                f"The stage {stage} is not done in {self.root}.", "Run the stages in order.", "stage_missing"
            )
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def save(self, dataset: Dataset) -> str:
        """Keep a data set under its name; its version."""
        dataset.save(self.root / "datasets")
        write_json(self.root / "datasets" / f"{dataset.name}.json", {"version": dataset.version})
        return dataset.version

    def dataset(self, name: str) -> Dataset:
        """The newest version of a data set. Raises UserError when there is none."""
        path = self.root / "datasets" / f"{name}.json"
        if not path.exists():
            raise UserError(f"There is no data set {name} in {self.root}.", "Run the stage data.", "stage_missing")
        return Dataset.load(self.root / "datasets" / name / json.loads(path.read_text())["version"])

    def checkpoint(self, name: str) -> Path:
        return self.root / "checkpoints" / name

    def run(self, name: str) -> Path:
        return self.root / "runs" / name

    def keep_reference(
        self, system: PortSystem, row: Row, waveform: Waveform, compared: Waveform | None = None
    ) -> None:  # fmt: skip
        """What decoding and judging answers to a row need of its source: its tokens, and how it sounds decoded.

        `compared` is the recording that answers are compared with where that is not the source.
        """
        path = self.root / "references" / f"{row.source.sha256}.safetensors"
        if not path.exists():
            tokens = system.tokenize(waveform)
            before = tokens if compared is None or compared is waveform else system.tokenize(compared)
            decoded = features(at_16k(system.decode(before.mixed, before)), row.source.text)
            path.with_suffix(".json").write_text(json.dumps(decoded.tolist()))
            partial = path.with_suffix(".partial")
            partial.write_bytes(tokens.to_bytes())
            partial.replace(path)

    def reference(self, row: Row) -> tuple[Tokenized, Vector]:
        """The source's tokens and voice, and its acoustic features. Raises UserError when it was not kept."""
        path = self.root / "references" / f"{row.source.sha256}.safetensors"
        if not path.exists():
            raise UserError(f"There is no reference of row {row.id} in {self.root}.", "Run the stage data.")
        return Tokenized.from_bytes(path.read_bytes()), np.asarray(json.loads(path.with_suffix(".json").read_text()))

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A JSON document below the root that is made when it is not there: a part of a stage that a kill leaves."""
        path = self.root / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, make())
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def write_lines(self, name: str, lines: Sequence[dict[str, Any]]) -> None:
        """A JSONL file, whole or not at all."""
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        partial = self.root / f"{name}.partial"
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        partial.replace(self.root / name)

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.root / name).read_text(encoding="utf-8").splitlines()]
