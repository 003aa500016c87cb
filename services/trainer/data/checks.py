"""What must hold between sets: nothing of an evaluation set may be learned, and what a set holds, as numbers.

Knows rows, not where they lie.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.trainer.data.manifest import Dataset
from services.trainer.data.rows import Row
from shared.errors import UserError

_SPACES = re.compile(r"[\W_]+")


class Leak(UserError):
    """A training set shares speakers, texts or audio with an evaluation set."""

    default_code = "data_leak"


@dataclass(frozen=True)
class HeldOut:
    """What an evaluation set holds: speakers, normalised texts and audio hashes."""

    name: str
    speakers: frozenset[str]
    texts: frozenset[str]
    audio: frozenset[str]

    @classmethod
    def of(cls, name: str, rows: Sequence[Row]) -> HeldOut:
        return cls(
            name,
            frozenset(row.speaker for row in rows),
            frozenset(normal(text) for row in rows for text in _texts(row)),
            frozenset(hash for row in rows for hash in _hashes(row)),
        )


def normal(text: str) -> str:
    """A text without case, punctuation, spaces and [tags], which is how texts are compared."""
    return _SPACES.sub("", re.sub(r"\[[^\]]*\]", "", text)).lower()


def _texts(row: Row) -> list[str]:
    return [row.source.text, row.target.text, *([row.edit.target_text] if row.edit.target_text else [])]


def _hashes(row: Row) -> list[str]:
    return [row.source.sha256, row.target.sha256, *([row.rejected.sha256] if row.rejected else [])]


def check_leaks(training: Sequence[Row], held_out: Sequence[HeldOut], *, speakers: bool = True) -> None:
    """Raise Leak naming the first rows that share something with an evaluation set.

    `speakers` False lets speakers be shared, for evaluations of texts only.
    """
    found = []
    for row in training:
        for other in held_out:
            if speakers and row.speaker in other.speakers:
                found.append(f"{row.id}: speaker {row.speaker} is in {other.name}")
            if any(normal(text) in other.texts for text in _texts(row)):
                found.append(f"{row.id}: its text is in {other.name}")
            if any(hash in other.audio for hash in _hashes(row)):
                found.append(f"{row.id}: its audio is in {other.name}")
    if found:
        rest = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise Leak(f"{len(found)} leaks into evaluation sets: {'; '.join(found[:5])}{rest}.",
                   "Leave these rows out of the training set.")  # fmt: skip


def statistics(dataset: Dataset) -> dict[str, Any]:
    """Hours, speakers, languages, categories, licences and margins of a set."""
    rows = dataset.rows
    margins: dict[str, list[float]] = {}
    for row in rows:
        if row.margin is not None:
            margins.setdefault(row.category, []).append(row.margin)
    return {
        "name": dataset.name, "version": dataset.version, "rows": len(rows),
        "hours": sum(row.source.seconds + row.target.seconds for row in rows) / 3600,
        "target_hours": sum(row.target.seconds for row in rows) / 3600,
        "speakers": len({row.speaker for row in rows}),
        "languages": dict(Counter(row.language for row in rows)),
        "categories": dict(Counter(row.category for row in rows)),
        "licences": dict(Counter(row.licence for row in rows)),
        "origins": dict(Counter(row.origin for row in rows)),
        "preferences": sum(row.rejected is not None for row in rows),
        "margins": {name: {"rows": len(v), "mean": sum(v) / len(v), "lowest": min(v), "highest": max(v)}
                    for name, v in sorted(margins.items())},
        "refused": len(dataset.refused),
    }  # fmt: skip
