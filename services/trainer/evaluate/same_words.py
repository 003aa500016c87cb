"""Whether two recordings say the same words, from their linguistic codes: no recogniser is asked.

The codes' centroids are compared along the best alignment (dynamic time warping), which leaves out how fast it is said.
The scale is fitted on readings that are known to say the same and on readings that do not. Knows nothing about models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shared.codes import Codes, split
from shared.errors import UserError

Table = npt.NDArray[np.float64]


def code_distances(centroids: npt.ArrayLike) -> Table:
    """Distance of every code to every other, (K, K) in [0, 2]: one less the cosine of the centred centroids (K, D)."""
    points = np.asarray(centroids, np.float64)
    points = points - points.mean(0)
    points /= np.linalg.norm(points, axis=1, keepdims=True) + 1e-9
    return np.asarray(1.0 - points @ points.T)


def distance(a: Codes, b: Codes, table: Table) -> float:
    """Mean distance along the best alignment of two mixed sequences; both ends are held together.

    Raises UserError for a sequence without codes.
    """
    rows, columns = (split(mixed)[0] for mixed in (a, b))
    if not len(rows) or not len(columns):
        raise UserError("There is nothing to compare: a sequence of codes is empty.", code="invalid_codes")
    local = table[rows[:, None], columns[None, :]]
    height, width = local.shape
    best = np.full((height + 1, width + 1), np.inf)
    steps = np.zeros((height + 1, width + 1))
    best[0, 0] = 0.0
    for diagonal in range(2, height + width + 1):  # its cells depend on the two diagonals before it alone
        i = np.arange(max(1, diagonal - width), min(height, diagonal - 1) + 1)
        j = diagonal - i
        before = np.stack([best[i - 1, j - 1], best[i - 1, j], best[i, j - 1]])
        length = np.stack([steps[i - 1, j - 1], steps[i - 1, j], steps[i, j - 1]])
        choice, at = before.argmin(0), np.arange(len(i))
        best[i, j] = before[choice, at] + local[i - 1, j - 1]
        steps[i, j] = length[choice, at] + 1
    return float(best[height, width] / steps[height, width])


@dataclass(frozen=True, eq=False)
class SameWords:
    """Rates from 1 (other words) to 10 (as alike as two readings of the same words).

    table: distances of codes (K, K). same, other: medians of the distance of readings of the same and of other words.
    """

    table: Table
    same: float
    other: float

    @classmethod
    def fit(cls, table: Table, same: Sequence[tuple[Codes, Codes]], other: Sequence[tuple[Codes, Codes]]) -> SameWords:
        """Raises UserError when the two kinds of pairs cannot be told apart."""
        if not same or not other:
            raise UserError("Pairs that say the same and pairs that do not are both needed.", code="invalid_training")
        low, high = (float(np.median([distance(a, b, table) for a, b in pairs])) for pairs in (same, other))
        if low >= high:
            raise UserError(
                "Readings of the same words are no more alike than readings of others.",
                "The linguistic codes carry no words.",
                "invalid_training",
            )
        return cls(table, low, high)

    def rating(self, a: Codes, b: Codes) -> float:
        """How far two sequences say the same, 1 to 10."""
        share = (self.other - distance(a, b, self.table)) / (self.other - self.same)
        return 1.0 + 9.0 * float(np.clip(share, 0.0, 1.0))

    def save(self, path: Path) -> None:
        """Write the scale as JSON; the table is the checkpoint's."""
        path.write_text(json.dumps({"same": self.same, "other": self.other}), encoding="utf-8")

    @classmethod
    def load(cls, path: Path, table: Table) -> SameWords:
        """What `save` wrote."""
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(table, float(found["same"]), float(found["other"]))
