"""A set cut in two, a part to train on and one held out, which share nothing that a leak check would find.

Knows rows only; which go where follows from the seed and the names, not from the order.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from services.trainer.data.checks import HeldOut, leaks, normal
from services.trainer.data.manifest import Dataset, Refused
from services.trainer.data.rows import Row
from shared.errors import UserError

By = Literal["speaker", "text"]


@dataclass(frozen=True)
class Split:
    """The two parts; what shares something with the held-out one is refused in the training part."""

    training: Dataset
    held_out: Dataset


def split(dataset: Dataset, share: float, by: By, seed: int = 0) -> Split:
    """Hold out whole speakers (or, with speakers shared, whole texts) until `share` of the rows is reached.

    Raises UserError when one part would be empty.
    """

    def key(row: Row) -> str:
        return row.speaker if by == "speaker" else normal(row.source.text)

    names = sorted({key(row) for row in dataset.rows},
                   key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())  # fmt: skip
    chosen: set[str] = set()
    while names and sum(key(row) in chosen for row in dataset.rows) < share * len(dataset.rows):
        chosen.add(names.pop(0))
    held = tuple(row for row in dataset.rows if key(row) in chosen)
    other = HeldOut.of(f"{dataset.name}-held-out", held)
    rest: list[Row] = []
    refused = []
    for number, row in enumerate(dataset.rows, start=1):
        found = leaks(row, other, speakers=by == "speaker")
        if not found:
            rest.append(row)
        elif key(row) not in chosen:
            refused.append(Refused(number, row.id, found[0]))
    if not rest or not held:
        raise UserError(f"{dataset.name} cannot be split by {by}: {len(rest)} rows would be left.",
                        "Split it by the other, or build two sets of other speakers.", "invalid_dataset")  # fmt: skip
    made_by = {"split_of": dataset.version, "by": by, "share": share, "seed": seed}
    return Split(
        Dataset(f"{dataset.name}-train", tuple(rest), made_by, tuple(refused), dataset.folders),
        Dataset(other.name, held, made_by, (), dataset.folders),
    )
