"""The format of Step-Audio-Edit-Benchmark: one JSON line per case, and what each case asks a system to do.

A case gives a reference recording with its text and a text to be said. Iteration 0 clones the reference; iteration n
edits the result of n - 1 towards the case's emotion, style or sounds (arXiv 2511.03601, section 5). Ids are not unique
in the published files, so cases are told apart by all their fields. Knows nothing about systems and judges.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from services.trainer.data.build import without_tags
from services.trainer.data.rows import reason
from shared.errors import UserError
from shared.schemas.edit import Edit
from shared.tags import bracketed_tags

Task = Literal["emotion", "style", "paralinguistic"]
ALIASES = {"act_cute": "act_coy", "whisper (asmr)": "whisper", "surprise": "surprised", "natural": "none",
           "neutral": "none"}  # fmt: skip
"""Names that judges and result files use for the same label."""


class Case(BaseModel):
    """One case. `prompt_audio` is relative to the folder of its file."""

    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True)

    id: str
    speaker: str
    gen_text: str = Field(min_length=1)
    prompt_audio: str
    prompt_text: str = Field(min_length=1)
    lang: str
    task: Task
    task_sub: str

    @field_validator("task", mode="before")
    @classmethod
    def _spelled(cls, task: object) -> object:
        return "paralinguistic" if task == "paralingustic" else task

    @property
    def key(self) -> str:
        """Unlike `id`, different for every case; fit for a file name."""
        digest = hashlib.sha256(f"{self.id}\0{self.gen_text}\0{self.prompt_audio}\0{self.lang}".encode()).hexdigest()
        return f"{self.task}-{self.task_sub.replace(' ', '_')}-{self.speaker}-{digest[:10]}"

    @property
    def words(self) -> str:
        """The text without its tags: what is cloned, and what a recogniser should hear."""
        return without_tags(self.gen_text) if self.task == "paralinguistic" else self.gen_text

    @property
    def edit(self) -> Edit:
        """What every iteration after the first asks for. Raises UserError for sounds without tags in the text."""
        if self.task != "paralinguistic":
            return Edit(type=self.task, detail=same_label(self.task_sub))
        if not bracketed_tags(self.gen_text):
            raise UserError(f"Case {self.id}: the text of a paralinguistic case holds no [tag].", code="bad_row")
        return Edit(type="paralinguistic", target_text=self.gen_text)


def same_label(label: str) -> str:
    """A label in the spelling of the tags."""
    return ALIASES.get(label.strip().lower(), label.strip())


def read_cases(path: Path) -> list[tuple[Case, Path]]:
    """The cases of a JSONL file with the paths of their recordings. Raises UserError naming the bad row."""
    cases: list[tuple[Case, Path]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"The benchmark {path} cannot be read: {error.strerror}.", code="benchmark_not_found"
        ) from error
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            case = Case.model_validate_json(line)
        except ValidationError as error:
            raise UserError(f"{path}, row {number}: {reason(error)}.", code="bad_row") from error
        audio = path.parent / case.prompt_audio
        if not audio.is_file():
            raise UserError(
                f"{path}, row {number}: there is no recording {audio}.", "Fetch the benchmark whole.", "bad_row"
            )
        if case.key not in seen:
            cases.append((case, audio))
            seen.add(case.key)
    return cases


def write_cases(cases: Sequence[Case], path: Path) -> None:
    """A benchmark file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(c.model_dump(), ensure_ascii=False) + "\n" for c in cases), encoding="utf-8")
