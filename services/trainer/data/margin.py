"""Margins: how clearly an expressive recording differs from its neutral twin, 1 to 10, and which pairs are kept.

The scorer is trained on a small annotated set: a ridge regression on acoustic changes per category, with one for all
categories behind it. The thresholds are those of arXiv 2511.03601: one per category, none under 6.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, field_validator

from services.trainer.data.records import bad_line, checked, records
from services.trainer.data.rows import Row
from shared.errors import UserError
from shared.tags import check_tag

LOWEST_THRESHOLD = 6.0
LOWEST, HIGHEST = 1.0, 10.0
FEWEST_PER_CATEGORY = 12

Vector = npt.NDArray[np.float64]


class Annotation(BaseModel):
    """What people said about one pair: its category ("emotion happy"), a rating from 1 to 10, and both recordings.

    `source` (neutral) and `audio` (expressive) are paths relative to the file of annotations.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True)

    id: str = Field(min_length=1)
    category: str
    rating: float = Field(ge=LOWEST, le=HIGHEST)
    source: Path
    audio: Path

    @field_validator("category")
    @classmethod
    def _known(cls, category: str) -> str:
        return known_category(category)


def known_category(category: str) -> str:
    """A category of triplets in published spelling. Raises ValueError for one that is none."""
    kind, _, detail = category.strip().partition(" ")
    try:
        return f"{kind} {check_tag(kind, detail)}"
    except UserError as error:
        raise ValueError(error.message) from error


def read_annotations(path: Path) -> list[Annotation]:
    """Annotations from JSONL or CSV with the columns of Annotation. Raises UserError naming the bad row."""
    found: dict[str, Annotation] = {}
    for number, line in records(path):
        one = checked(Annotation, line, path, number)
        if one.id in found:
            raise bad_line(path, number, f"the id {one.id!r} is taken by another pair")
        found[one.id] = one
    return list(found.values())


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
        """Raises UserError when there is none."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            weights = {name: np.asarray(w) for name, w in document["weights"].items()}
            return cls(weights, np.asarray(document["mean"]), np.asarray(document["scale"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no margin scorer: {error}.", "Fit one with `editx data fit-margins`.",
                            "margin_scorer_invalid") from error  # fmt: skip


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
