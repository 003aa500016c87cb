"""Prompts that start where an iterated edit starts: from a recording that the model made itself.

The benchmark edits clones and then edits of clones, and so do users. A reward model and a policy that only ever met
readings by a teacher know nothing of those. Knows nothing about training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from services.trainer.data.rows import Row, Side
from services.trainer.evaluate.system import PortSystem
from services.trainer.recipes.post_train.material import Item
from services.trainer.recipes.post_train.workplace import Workplace
from shared.audio.io import Waveform
from shared.errors import EditxError

log = logging.getLogger(__name__)


def iterate(
    rows: Sequence[Row], name: str, readings: Sequence[Item], system: PortSystem, work: Workplace, *,
    share: float, seed: int, workers: int, progress: Callable[[float, str], None] = lambda fraction, note: None,
) -> list[Row]:  # fmt: skip
    """The rows, a share of which start from the model's own recordings: in turn a clone, and a clone edited once.

    A clone says the row's text in the voice of another of the `readings` (neutral, of the same part). Answers to an
    edited clone are compared with the clone, as the benchmark does. A row whose clone fails keeps its source. Rows that
    a killed run made are not made again.
    """
    rng = np.random.default_rng((seed, 10, len(rows)))
    chosen = [int(k) for k in rng.permutation(len(rows))[: round(share * len(rows))]]
    voices = {k: _voice(rows[k], readings, rng) for k in sorted(chosen)}

    def one(place: int) -> Row:
        edited = chosen.index(place) % 2 == 1
        made = work.once(
            f"iterated/{name}-{place:04d}.json",
            lambda: _own(rows[place], voices[place], edited, system, work, seed + place).model_dump(mode="json"),
        )
        return Row.model_validate(made)

    own: dict[int, Row] = {}
    with ThreadPoolExecutor(workers) as pool:
        for place, row in zip(voices, pool.map(one, voices), strict=True):
            own[place] = row
            progress(len(own) / len(voices), f"{len(own)} of {len(voices)} own recordings for {name}")
    return [own.get(place, row) for place, row in enumerate(rows)]


def _voice(row: Row, readings: Sequence[Item], rng: np.random.Generator) -> Item | None:
    """A reading of other words in the row's language."""
    others = [item for item in readings if item.language == row.language and item.text != row.source.text]
    return others[int(rng.integers(len(others)))] if others else None


def _own(row: Row, voice: Item | None, edited: bool, system: PortSystem, work: Workplace, seed: int) -> Row:
    if voice is None:
        return row
    try:
        clone: Waveform = system.clone(voice.audio(), voice.text, row.source.text, seed)
        source = system.edit(clone, row.source.text, row.edit, seed + 1) if edited else clone
        made = row.model_copy(update={
            "id": f"{row.id}-{'edited' if edited else 'cloned'}", "speaker": voice.speaker,
            "source": Side(text=row.source.text, mixed=system.tokenize(source).mixed),
            "origin": f"{voice.origin}+own",
        })  # fmt: skip
        work.keep_reference(system, made, source, compared=clone)
    except EditxError as error:
        log.warning("row %s keeps its source, its clone failed: %s", row.id, error)
        return row
    return made
