"""Answers to prompts made audible and put before a judge, beside what the prompt's source sounds like decoded.

Both go through the codes and the same decoder, so that what decoding does to a voice is not taken for an edit. Knows
rows and judges, not what the verdicts are for.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from services.trainer.data.manifest import Dataset
from services.trainer.data.rows import Row
from services.trainer.evaluate.remote import NONE, BudgetSpent, Judge, Question, Verdict
from services.trainer.evaluate.system import PortSystem
from shared.artifacts import Tokenized
from shared.audio.io import Waveform, read_audio, write_audio
from shared.codes import Codes
from shared.errors import EditxError, TransientError, UserError
from shared.schemas.edit import REMOVE, Edit

log = logging.getLogger(__name__)

HIGHEST = {"emotion": 10.0, "style": 10.0, "paralinguistic": 3.0}
"""The top of a judge's rating by task; it begins at 1."""


def question_about(edit: Edit, source_text: str, labels: Sequence[str]) -> Question:
    """What a judge is asked about an answer to an edit; `labels` are the choice for its task."""
    wanted = NONE if edit.detail == REMOVE else edit.detail or ""
    return Question(edit.type, wanted, edit.target_text or source_text, tuple(labels), source_text)


def labels_of(edits: Sequence[Edit]) -> dict[str, list[str]]:
    """The closed choice of each task: the tags that occur."""
    found: dict[str, set[str]] = {}
    for edit in edits:
        if edit.detail is not None and edit.detail != REMOVE:
            found.setdefault(edit.type, set()).add(edit.detail)
    return {task: sorted(names) for task, names in found.items()}


def share_of(verdict: Verdict, task: str) -> float:
    """A rating as a share of its scale, 0 to 1."""
    return float(np.clip((verdict.rating - 1) / (HIGHEST[task] - 1), 0.0, 1.0))


@dataclass(frozen=True, eq=False)
class Spoken:
    """The source of a prompt: what decoding in its voice needs, and how it sounds decoded."""

    tokens: Tokenized
    decoded: Waveform


def speak_source(system: PortSystem, dataset: Dataset, row: Row) -> Spoken:
    """The recording of a row's source through the codes. Raises UserError for a set that does not have it."""
    tokens = system.tokenize(read_audio(dataset.recording(row, row.source)))
    return Spoken(tokens, system.decode(tokens.mixed, tokens))


class Hearing:
    """The held-out judge of PPO: `watched` prompts, of which those count that the judge can hear.

    Raises UserError when there is none, and for a set without recordings.
    """

    def __init__(self, watched: Dataset, system: PortSystem, judge: Judge, *, workers: int = 2) -> None:
        self._rows, self._system, self._judge, self._workers = watched.rows, system, judge, workers
        kinds = {kind for kind in HIGHEST if judge.hears(kind)}
        self.heard = [k for k, row in enumerate(watched.rows) if row.edit.type in kinds]
        if not self.heard:
            raise UserError(f"The judge {judge.name} hears none of the edits of {watched.name}.",
                            "Watch emotion or style edits.", "invalid_training")  # fmt: skip
        for k in self.heard:
            watched.recording(watched.rows[k], watched.rows[k].source)
        self._watched = watched

    @cached_property
    def _sources(self) -> dict[int, Spoken]:
        return {k: speak_source(self._system, self._watched, self._rows[k]) for k in self.heard}

    def __call__(self, places: Sequence[int], answers: Sequence[Codes]) -> float:
        """The mean share of the judge's scale that answers to the watched prompts get; 0 where nothing is heard."""
        labels = labels_of([row.edit for row in self._rows])

        def one(pair: tuple[int, Codes]) -> float:
            place, mixed = pair
            row, source = self._rows[place], self._sources[place]
            try:
                said = self._system.decode(mixed, source.tokens, seed=place)
                wavs = [write_audio(waveform, None, "wav") or b"" for waveform in (said, source.decoded)]
                question = question_about(row.edit, row.source.text, labels.get(row.edit.type, ()))
                return share_of(self._judge.ask(question, *wavs), row.edit.type)
            except (BudgetSpent, TransientError):
                raise
            except EditxError as error:
                log.warning("an answer to %s counts 0, nothing is heard: %s", row.id, error)
                return 0.0

        asked = [pair for pair in zip(places, answers, strict=True) if pair[0] in self._sources]
        with ThreadPoolExecutor(self._workers) as pool:
            return float(np.mean([*pool.map(one, asked)]))
