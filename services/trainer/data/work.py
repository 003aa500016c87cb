"""How a build carries out its rows: each on its own, so that a bad one is reported, and where asked kept on the way.

A build that was killed goes on with the rows that it had made, if its description and material are the same. Knows
nothing about how a row is made.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import soundfile
from pydantic import ValidationError

from services.trainer.core.runs import write_json
from services.trainer.data.manifest import AUDIO, Refused
from services.trainer.data.rows import Row, as_pcm, reason
from shared.audio.io import Waveform
from shared.errors import EditxError, TransientError

ROWS, DESCRIPTION = "rows.jsonl", "description.json"


class Work:
    """Makes rows and keeps nothing."""

    def row(self, number: int, id: str, make: Callable[[], Row]) -> Row | Refused:
        """What `make` returns, or why it does not. Raises TransientError: another try may make it."""
        try:
            return make()
        except TransientError:
            raise
        except (EditxError, ValueError) as error:
            return Refused(number, id, reason(error))

    def audio(self, waveform: Waveform, sha256: str) -> str | None:
        """Where the recording lies in the set's folder, None where none is kept."""
        return None

    def finish(self) -> None:
        """The set is written: nothing is needed any more."""


class KeptWork(Work):
    """Rows are appended to a file as they are made, and recordings written where `keep_audio` says so.

    Refused rows are tried again, since what was missing may be there now.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any], *, keep_audio: bool = False) -> None:
        self.folder, self._keep_audio = folder, keep_audio
        known = folder / DESCRIPTION
        if known.exists() and json.loads(known.read_text(encoding="utf-8")) != description:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(known, description)
        self._rows = {row.id: row for row in _whole_rows(folder / ROWS)}
        _write_rows(self._rows.values(), folder / ROWS)  # a line that a kill cut short goes

    def row(self, number: int, id: str, make: Callable[[], Row]) -> Row | Refused:
        if id in self._rows:
            return self._rows[id]
        made = super().row(number, id, make)
        if isinstance(made, Row):
            with (self.folder / ROWS).open("a", encoding="utf-8") as file:
                file.write(made.model_dump_json() + "\n")
        return made

    def audio(self, waveform: Waveform, sha256: str) -> str | None:
        if not self._keep_audio:
            return None
        name = f"{AUDIO}/{sha256}.flac"
        target = self.folder / name
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            partial = target.with_suffix(".partial")
            soundfile.write(partial, as_pcm(waveform.samples), waveform.sample_rate_hz, format="FLAC")
            os.replace(partial, target)
        return name

    def finish(self) -> None:
        shutil.rmtree(self.folder)


def _whole_rows(path: Path) -> list[Row]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(Row.model_validate_json(line))
        except ValidationError:
            break
    return rows


def _write_rows(rows: Iterable[Row], path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)
