"""Margins: how clearly an expressive recording differs from its neutral twin, 1 to 10, and which pairs are kept.

The scorer is trained on a small annotated set: a ridge regression on acoustic changes per category, with one for all
categories behind it. The thresholds are those of arXiv 2511.03601: one per category, none under 6.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from services.trainer.data.rows import Row
from shared.errors import UserError

LOWEST_THRESHOLD = 6.0
LOWEST, HIGHEST = 1.0, 10.0
FEWEST_PER_CATEGORY = 12

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Annotation:
    """What people said about one pair: its id, its category ("emotion happy") and a rating from 1 to 10."""

    id: str
    category: str
    rating: float


def read_annotations(path: Path) -> list[Annotation]:
    """Annotations from JSONL or CSV with the columns id, category, rating. Raises UserError naming the bad row."""
    text = path.read_text(encoding="utf-8")
    lines: Iterable[Mapping[str, object]]
    try:
        is_json = path.suffix in (".jsonl", ".json")
        lines = (
            [json.loads(s) for s in text.splitlines() if s.strip()] if is_json else csv.DictReader(text.splitlines())
        )
        found = []
        for number, line in enumerate(lines, start=1):
            rating = float(str(line["rating"]))
            if not LOWEST <= rating <= HIGHEST:
                raise UserError(f"{path}, row {number}: rating {rating} is not in 1..10.", code="bad_row")
            found.append(Annotation(str(line["id"]), str(line["category"]), rating))
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: a row lacks id, category or a number as rating ({error}).", code="bad_row") from error
    return found


@dataclass(frozen=True, eq=False)
class MarginScorer:
    """Ratings from acoustic changes (d,): per category weights (d + 1,), "" for all; mean and scale of the inputs."""

    weights: dict[str, Vector]
    mean: Vector
    scale: Vector

    @classmethod
    def fit(cls, x: npt.ArrayLike, categories: Sequence[str], ratings: npt.ArrayLike, *, ridge: float = 1.0
            ) -> MarginScorer:  # fmt: skip
        """Train on changes (n, d), (n,) categories and (n,) ratings. Raises UserError without any."""
        data, wanted = np.asarray(x, np.float64), np.asarray(ratings, np.float64)
        if not len(data):
            raise UserError("There are no annotated pairs to learn margins from.", code="invalid_training")
        mean, scale = data.mean(0), data.std(0) + 1e-6
        inputs = _expanded((data - mean) / scale)
        weights = {"": _ridge(inputs, wanted, ridge)}
        for category in sorted(set(categories)):
            own = np.array([c == category for c in categories])
            if own.sum() >= FEWEST_PER_CATEGORY:
                weights[category] = _ridge(inputs[own], wanted[own], ridge)
        return cls(weights, mean, scale)

    def score(self, change: npt.ArrayLike, category: str) -> float:
        """The margin of one pair, 1 to 10. Raises UserError where the scorer was fitted on other features."""
        if np.shape(change)[-1] != len(self.mean):
            raise UserError(f"The margin scorer knows {len(self.mean)} features, the pair has {np.shape(change)[-1]}.",
                            "Fit it again.", "margin_scorer_invalid")  # fmt: skip
        inputs = _expanded((np.atleast_2d(np.asarray(change, np.float64)) - self.mean) / self.scale)
        return float(np.clip(inputs @ self.weights.get(category, self.weights[""]), LOWEST, HIGHEST)[0])

    def save(self, path: Path) -> None:
        document = {"weights": {k: v.tolist() for k, v in self.weights.items()}, "mean": self.mean.tolist(),
                    "scale": self.scale.tolist()}  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> MarginScorer:
        document = json.loads(path.read_text(encoding="utf-8"))
        weights = {name: np.asarray(w) for name, w in document["weights"].items()}
        return cls(weights, np.asarray(document["mean"]), np.asarray(document["scale"]))


def _expanded(x: Vector) -> Vector:
    """Changes, their sizes, and a constant: a margin grows with the size of a change whichever way it goes."""
    return np.column_stack([x, np.abs(x), np.ones(len(x))])


def _ridge(x: Vector, y: Vector, strength: float) -> Vector:
    penalty = strength * np.eye(x.shape[1])
    penalty[-1, -1] = 0.0  # the constant is free
    return np.asarray(np.linalg.solve(x.T @ x + penalty, x.T @ y))


@dataclass(frozen=True)
class Thresholds:
    """The lowest margin that is kept, per category. Raises UserError for one under 6."""

    default: float = LOWEST_THRESHOLD
    by_category: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in {"default": self.default, **self.by_category}.items():
            if value < LOWEST_THRESHOLD:
                raise UserError(f"The margin threshold {name} is {value}; none may be under {LOWEST_THRESHOLD:g}.",
                                code="invalid_training")  # fmt: skip

    def of(self, category: str) -> float:
        return self.by_category.get(category, self.default)


@dataclass(frozen=True)
class Filtered:
    """Rows at or above their threshold, and the margins by category before and after."""

    rows: list[Row]
    before: dict[str, list[float]]
    after: dict[str, list[float]]


def keep_large_margins(rows: Sequence[Row], thresholds: Thresholds) -> Filtered:
    """Drop rows under their category's threshold. Raises UserError naming a row without a margin."""
    before, after, kept = defaultdict(list), defaultdict(list), []
    for row in rows:
        if row.margin is None:
            raise UserError(f"Row {row.id} has no margin.", "Score the set with a margin scorer first.", "bad_row")
        before[row.category].append(row.margin)
        if row.margin >= thresholds.of(row.category):
            after[row.category].append(row.margin)
            kept.append(row)
    return Filtered(kept, dict(before), dict(after))
