"""Corpora of speech with sounds marked in their texts, in NVSpeech's layout (arXiv 2508.04195), as recordings.

Two forms are read: an index (metadata.jsonl or metadata.csv with file_name and text), and a JSON file beside each
recording, as Emilia has. A sound stands in brackets of any kind, [Laughter], (Laughter) or <Laughter>; Crying and Shh,
which no published edit knows, leave a recording out. Knows nothing about tokens or teachers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from services.trainer.data.manifest import Refused
from services.trainer.data.records import records
from services.trainer.data.rows import reason
from shared.errors import UserError
from shared.tags import PARALINGUISTIC, bracketed_tags, check_text_tags

INDEXES = ("metadata.jsonl", "metadata.csv")
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")
UNPUBLISHED = ("Crying", "Shh")
"""NVSpeech's categories that no published tag stands for."""
_NAMES = "|".join(re.escape(name) for name in sorted((*PARALINGUISTIC, *UNPUBLISHED), key=len, reverse=True))
_MARKED = re.compile(rf"[\[(<（【]\s*({_NAMES})\s*[\])>）】]", re.IGNORECASE)


class Utterance(BaseModel):
    """What the corpus says about one recording, under the names that its releases use."""

    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True)

    text: str = Field(min_length=1)
    audio: str = Field(default="", validation_alias=AliasChoices("file_name", "wav", "audio", "path"))
    id: str = ""
    speaker: str = ""
    language: str = ""


def import_recordings(
    folder: Path, out: Path, *, licence: str, language: str, origin: str
) -> tuple[int, list[Refused]]:  # fmt: skip
    """Write the lines of recordings that a description of kind paralinguistic names; how many, and what was left out.

    `language` stands where the corpus names none; a recording without a speaker is a speaker of its own. Raises
    UserError for a folder without such a corpus.
    """
    lines, refused, seen = [], [], set[str]()
    for number, (place, document) in enumerate(_documents(folder), start=1):
        try:
            one = Utterance.model_validate(document)
            audio, text = _audio(folder, place, one), tagged(one.text)
            id = one.id or str(audio.relative_to(folder).with_suffix("")).replace(os.sep, "-")
            if id in seen:
                raise UserError("its id is taken by another recording", code="bad_row")
            seen.add(id)
            lines.append({
                "id": id, "audio": os.path.relpath(audio, out.parent), "text": text,
                "language": one.language or language, "speaker": one.speaker or id, "licence": licence,
                "origin": origin,
            })  # fmt: skip
        except (UserError, ValidationError) as error:
            refused.append(Refused(number, place, reason(error)))
    if not lines and not refused:
        raise UserError(f"{folder} holds no corpus: neither {' nor '.join(INDEXES)} nor recordings with a JSON file.",
                        code="invalid_dataset")  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    os.replace(partial, out)
    return len(lines), refused


def tagged(text: str) -> str:
    """A corpus's text with its sounds as published [tags]. Raises UserError for one without, or with other sounds."""
    found = check_text_tags(_MARKED.sub(lambda match: f"[{match[1]}]", text.strip()))
    if not bracketed_tags(found):
        raise UserError("its text marks no sound", code="bad_row")
    return found


def _documents(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each utterance stands, and what is said there."""
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    if index is not None:
        for number, line in records(index):
            yield f"{index.name}, row {number}", line
        return
    for path in sorted(folder.rglob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            document = None
        yield str(path.relative_to(folder)), document if isinstance(document, dict) else {}


def _audio(folder: Path, place: str, one: Utterance) -> Path:
    """The recording that is named, or the one beside the utterance's JSON file."""
    beside = folder / place
    named = [folder / one.audio, beside.parent / Path(one.audio).name] if one.audio else []
    siblings = [beside.with_suffix(suffix) for suffix in SUFFIXES] if beside.suffix == ".json" else []
    found = next((path for path in [*named, *siblings] if path.is_file()), None)
    if found is None:
        raise UserError(f"there is no recording {one.audio}".rstrip(), code="bad_row")
    return found
