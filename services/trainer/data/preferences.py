"""Preferences: candidates for a prompt, what people or judges say of them, and the pairs that are clear enough.

The margins are those of arXiv 2511.03601: ratings of people from 1 to 5 with a difference above 3, ratings of judges
from 1 to 10 with a difference above 8. A composite score weighs correctness, prosody, naturalness, margin and words, so
that a bigger change alone never wins.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from services.trainer.data.records import checked, records
from services.trainer.data.rows import MixedCodes, Row, Side
from shared.errors import UserError

HUMAN_MARGIN, JUDGE_MARGIN = 3.0, 8.0
MARGINS = {5: HUMAN_MARGIN, 10: JUDGE_MARGIN}
"""How far a pair must be apart, by the scale of its ratings."""
CANDIDATES_PER_PROMPT = 20


class Candidate(BaseModel):
    """One answer to a prompt. `prompt` is the id of the row whose prompt it answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    prompt: str
    mixed: MixedCodes


class Rating(BaseModel):
    """What one rater says of one candidate, on the rater's scale: people from 1 to 5, judges from 1 to 10."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    candidate: str
    rater: str = Field(min_length=1)
    scale: Literal[5, 10] = 5
    correctness: float = Field(ge=1, le=10)
    prosody: float | None = Field(default=None, ge=1, le=10)
    naturalness: float | None = Field(default=None, ge=1, le=10)
    margin: float | None = Field(default=None, ge=1, le=10)
    words: float | None = Field(default=None, ge=1, le=10)

    @field_validator("scale", mode="before")
    @classmethod
    def _number(cls, scale: object) -> object:
        return int(scale) if isinstance(scale, str) and scale.isdecimal() else scale

    @model_validator(mode="after")
    def _on_its_scale(self) -> Self:
        for name, value in self.parts().items():
            if value > self.scale:
                raise ValueError(f"{name} is {value:g} on a scale of {self.scale}; a judge's rating says scale: 10")
        return self

    def parts(self) -> dict[str, float]:
        """The aspects that were rated."""
        given = {"correctness": self.correctness, "prosody": self.prosody, "naturalness": self.naturalness,
                 "margin": self.margin, "words": self.words}  # fmt: skip
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Weights:
    """How much each part of a rating counts. Correctness and words gate: the whole is never above either by more than
    `lead`.

    Without the gates a candidate could win by being louder or slower than asked while saying the wrong words.
    """

    correctness: float = 0.5
    prosody: float = 0.2
    naturalness: float = 0.2
    margin: float = 0.1
    words: float = 0.2
    lead: float = 1.0

    def __post_init__(self) -> None:
        parts = (self.correctness, self.prosody, self.naturalness, self.margin, self.words)
        if min(parts) < 0 or sum(parts) <= 0:
            raise UserError("Weights of a composite score must not be negative, and one must be positive.",
                            code="invalid_training")  # fmt: skip


def composite(rating: Rating, weights: Weights) -> float:
    """The weighted mean of the parts that were rated, gated by correctness and, where rated, by words."""
    parts = [(getattr(weights, name), value) for name, value in rating.parts().items()]
    total = sum(weight for weight, _ in parts)
    mean = sum(weight * value for weight, value in parts) / total if total else rating.correctness
    gates = [rating.correctness, *([] if rating.words is None else [rating.words])]
    return min(mean, min(gates) + weights.lead)


def read_ratings(path: Path) -> list[Rating]:
    """Ratings from JSONL, or CSV with the columns of Rating. Raises UserError naming the bad row."""
    return [checked(Rating, line, path, number) for number, line in records(path)]


def scale_of(ratings: Sequence[Rating]) -> int:
    """The scale that all ratings share. Raises UserError where people's and judges' are mixed, and without any."""
    scales = sorted({rating.scale for rating in ratings})
    if len(scales) != 1:
        told = "There are no ratings." if not scales else "Ratings on scales of 5 and of 10 cannot be compared."
        raise UserError(told, "Build one set of preferences from people's ratings and one from judges'.",
                        "invalid_dataset")  # fmt: skip
    return scales[0]


def scores_of(ratings: Sequence[Rating], weights: Weights) -> dict[str, float]:
    """Candidate id to the mean composite of its ratings, which must be on one scale. Raises UserError."""
    scale_of(ratings)
    found: dict[str, list[float]] = defaultdict(list)
    for rating in ratings:
        found[rating.candidate].append(composite(rating, weights))
    return {candidate: sum(values) / len(values) for candidate, values in found.items()}


def furthest(candidates: Sequence[Candidate], scores: Mapping[str, float]) -> float:
    """How far the best and the worst rated candidate of one prompt are apart, for the prompt where it is most."""
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for candidate in candidates:
        if candidate.id in scores:
            by_prompt[candidate.prompt].append(scores[candidate.id])
    return max((max(own) - min(own) for own in by_prompt.values()), default=0.0)


def make_pairs(
    prompts: Mapping[str, Row], candidates: Sequence[Candidate], scores: Mapping[str, float], *, margin: float,
    rated_by: str, per_prompt: int = 4,
) -> list[Row]:  # fmt: skip
    """Rows with a chosen and a rejected answer whose scores differ by MORE than `margin`.

    Per prompt the clearest `per_prompt` pairs, each candidate in one pair at most. Raises UserError for a candidate of
    an unknown prompt.
    """
    by_prompt: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        if candidate.prompt not in prompts:
            raise UserError(
                f"Candidate {candidate.id} answers the unknown prompt {candidate.prompt!r}.", code="bad_row"
            )
        if candidate.id in scores:
            by_prompt[candidate.prompt].append(candidate)
    rows = []
    for prompt, own in by_prompt.items():
        ranked = sorted(own, key=lambda c: (scores[c.id], c.id))
        for number in range(min(per_prompt, len(ranked) // 2)):
            worse, better = ranked[number], ranked[-1 - number]
            gap = scores[better.id] - scores[worse.id]
            if gap > margin:
                rows.append(pair_of(prompts[prompt], better, worse, gap, rated_by))
    return rows


def pair_of(prompt: Row, better: Candidate, worse: Candidate, gap: float, rated_by: str) -> Row:
    """A prompt's row with a chosen and a rejected answer, `gap` apart."""
    text = prompt.target.text
    chosen, rejected = (Side(text=text, mixed=one.mixed) for one in (better, worse))
    update = {"id": f"{better.id}--{worse.id}", "target": chosen, "rejected": rejected, "margin": gap,
              "rated_by": rated_by}  # fmt: skip
    return prompt.model_copy(update=update)
