"""Lines that people and other programs hand over, from JSONL or CSV: each is a mapping, or is named with its reason.

Knows nothing about what the lines say.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from services.trainer.data.rows import reason
from shared.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and texts of the lines that are not blank. Raises UserError for a file that cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UserError(f"{path} cannot be read: {why}.", code="invalid_dataset") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, line


def records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line numbers and mappings of a CSV file (by its suffix, empty cells left out) or a JSONL file.

    Raises UserError naming the first line that is none.
    """
    lines = list(numbered_lines(path))
    if path.suffix == ".csv":
        numbers, texts = [number for number, _ in lines], [text for _, text in lines]
        reader = csv.DictReader(texts)
        for row in reader:
            yield numbers[reader.line_num - 1], {k: v for k, v in row.items() if k and v not in ("", None)}
        return
    for number, line in lines:
        try:
            found = json.loads(line)
        except ValueError as error:
            raise bad_line(path, number, "it is no JSON object") from error
        if not isinstance(found, dict):
            raise bad_line(path, number, "it is no JSON object")
        yield number, found


def checked(kind: type[Model], line: Mapping[str, Any], path: Path, number: int) -> Model:
    """A line as what it should be. Raises UserError naming it."""
    try:
        return kind.model_validate(line)
    except ValidationError as error:
        raise bad_line(path, number, reason(error)) from error


def bad_line(path: Path, number: int, why: str) -> UserError:
    """What to raise about a line."""
    return UserError(f"{path}, row {number}: {why}.", code="bad_row")
