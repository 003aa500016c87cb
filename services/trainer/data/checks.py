"""What must hold between sets: nothing of an evaluation set may be learned, and what a set holds, as numbers.

An evaluation set is a data set or a benchmark. A recording is told by the hash of its samples and by that of its
tokens, since rows may have been made from tokens alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.trainer.data.build import Tokenize
from services.trainer.data.manifest import Dataset
from services.trainer.data.records import numbered_lines
from services.trainer.data.rows import Row, Side, hash_audio, hash_codes
from services.trainer.evaluate.benchmark import Case, read_cases
from shared.audio.io import read_audio
from shared.errors import UserError

_SPACES = re.compile(r"[\W_]+")


class Leak(UserError):
    """A training set shares speakers, texts or audio with an evaluation set."""

    default_code = "data_leak"


@dataclass(frozen=True)
class HeldOut:
    """What an evaluation set holds: speakers, normalised texts, and hashes of recordings and of their tokens."""

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
            frozenset(mark for row in rows for side in _sides(row) for mark in side.fingerprints),
        )

    @classmethod
    def of_cases(cls, name: str, cases: Sequence[tuple[Case, Path]], tokenize: Tokenize | None = None) -> HeldOut:
        """A benchmark: the speakers and texts of its cases, its recordings and, given the tokenizer, their tokens."""
        recordings = [read_audio(path) for path in sorted({path for _, path in cases})]
        marks = {hash_audio(one.samples, one.sample_rate_hz) for one in recordings}
        if tokenize is not None:
            marks |= {hash_codes(tokenize(one)) for one in recordings}
        return cls(
            name,
            frozenset(case.speaker for case, _ in cases),
            frozenset(normal(text) for case, _ in cases for text in (case.prompt_text, case.gen_text)),
            frozenset(marks),
        )


def read_held_out(path: Path, training: Sequence[Row], tokenize: Callable[[], Tokenize]) -> HeldOut:
    """A data set (folder or JSONL) or a benchmark (JSONL of cases) that `training` is held against.

    The tokenizer is asked for when a benchmark is compared with rows whose recordings were not there. Raises UserError.
    """
    if path.is_file() and not any(True for _ in numbered_lines(path)):
        raise UserError(f"The evaluation set {path} is empty.", code="invalid_dataset")
    if path.is_file() and _holds_cases(path):
        by_tokens = any(side.is_hashed_by_tokens for row in training for side in _sides(row))
        return HeldOut.of_cases(str(path), read_cases(path), tokenize() if by_tokens else None)
    return HeldOut.of(str(path), Dataset.load(path).rows)


def _holds_cases(path: Path) -> bool:
    _, first = next(numbered_lines(path), (0, ""))
    try:
        return "gen_text" in json.loads(first)
    except (ValueError, TypeError):
        return False


def normal(text: str) -> str:
    """A text without case, punctuation, spaces and [tags], which is how texts are compared."""
    return _SPACES.sub("", re.sub(r"\[[^\]]*\]", "", text)).lower()


def _texts(row: Row) -> list[str]:
    return [row.source.text, row.target.text, *([row.edit.target_text] if row.edit.target_text else [])]


def _sides(row: Row) -> list[Side]:
    return [row.source, row.target, *([row.rejected] if row.rejected else [])]


def leaks(row: Row, other: HeldOut, *, speakers: bool = True) -> list[str]:
    """What a row shares with an evaluation set."""
    found = []
    if speakers and row.speaker in other.speakers:
        found.append(f"speaker {row.speaker} is in {other.name}")
    if any(normal(text) in other.texts for text in _texts(row)):
        found.append(f"its text is in {other.name}")
    if any(side.fingerprints & other.audio for side in _sides(row)):
        found.append(f"its audio is in {other.name}")
    return found


def check_leaks(training: Sequence[Row], held_out: Sequence[HeldOut], *, speakers: bool = True) -> None:
    """Raise Leak naming the first rows that share something with an evaluation set.

    `speakers` False lets speakers be shared, for evaluations of texts only.
    """
    found = [
        f"{row.id}: {why}" for row in training for other in held_out for why in leaks(row, other, speakers=speakers)
    ]
    if found:
        rest = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise Leak(f"{len(found)} leaks into evaluation sets: {'; '.join(found[:5])}{rest}.",
                   "Leave these rows out of the training set.")  # fmt: skip


def margins_of(rows: Sequence[Row]) -> dict[str, list[float]]:
    """The margins by category, of the rows that have one."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.margin is not None:
            found.setdefault(row.category, []).append(row.margin)
    return found


def hours_by(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, float]:
    """Hours of the answers, in groups."""
    found: dict[str, float] = {}
    for row in rows:
        found[key(row)] = found.get(key(row), 0.0) + row.target.seconds / 3600
    return found


def statistics(dataset: Dataset) -> dict[str, Any]:
    """Hours, speakers, languages, categories, licences and margins of a set."""
    rows = dataset.rows
    margins = margins_of(rows)
    return {
        "name": dataset.name, "version": dataset.version, "rows": len(rows),
        "hours": sum(row.source.seconds + row.target.seconds for row in rows) / 3600,
        "target_hours": sum(row.target.seconds for row in rows) / 3600,
        "speakers": len({row.speaker for row in rows}),
        "languages": dict(Counter(row.language for row in rows)),
        "hours_by_language": hours_by(rows, lambda row: row.language),
        "categories": dict(Counter(row.category for row in rows)),
        "licences": dict(Counter(row.licence for row in rows)),
        "origins": dict(Counter(row.origin for row in rows)),
        "preferences": sum(row.rejected is not None for row in rows),
        "margins": {name: {"rows": len(v), "mean": sum(v) / len(v), "lowest": min(v), "highest": max(v)}
                    for name, v in sorted(margins.items())},
        "refused": len(dataset.refused),
    }  # fmt: skip
