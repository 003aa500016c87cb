"""The format of Step-Audio-Edit-Benchmark: one JSON line per case, and what each case asks a system to do.

A case gives a reference recording with its text and a text to be said. Iteration 0 clones the reference; iteration n
edits the result of n - 1 towards the case's emotion, style or sounds (arXiv 2511.03601, section 5). Ids are not unique
in the published files, so cases are told apart by all their fields. Knows nothing about systems and judges.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from services.trainer.data.build import without_tags
from services.trainer.data.records import bad_line, checked, records
from services.trainer.data.rows import reason
from shared.audio.io import read_audio
from shared.errors import UserError
from shared.schemas.edit import Edit
from shared.tags import bracketed_tags, check_tag

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
    if not cases:
        raise UserError(f"The benchmark {path} holds no cases.", code="bad_row")
    return cases


def write_cases(cases: Sequence[Case], path: Path) -> None:
    """A benchmark file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(c.model_dump(), ensure_ascii=False) + "\n" for c in cases), encoding="utf-8")


class Voice(BaseModel):
    """A recording whose voice a benchmark clones: a line of recordings as `editx data build` reads them."""

    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True)

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    audio: Path
    text: str = Field(min_length=1)
    language: str
    speaker: str


class Wanted(BaseModel):
    """A text to be said, in a manner ("emotion/happy") or with sounds in it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    text: str = Field(min_length=1)
    language: str
    manner: str | None = None

    @property
    def task(self) -> tuple[str, str]:
        """Task and label. Raises UserError for a text that asks for nothing."""
        if sounds := bracketed_tags(self.text):
            return "paralinguistic", check_tag("paralinguistic", sounds[0])
        kind, _, detail = (self.manner or "").partition("/")
        if kind not in ("emotion", "style"):
            raise UserError("the text has neither a manner, emotion/ or style/, nor a [sound]", code="bad_row")
        return kind, check_tag(kind, detail)


def make_benchmark(recordings: Path, texts: Path, folder: Path, count: int, seed: int = 0) -> int:
    """Write up to `count` cases and their recordings into a folder; how many.

    The texts come in turn, each in a voice of its language that says something else and has not said it yet. Raises
    UserError naming a bad line, or where voices or texts are missing.
    """
    voices = [checked(Voice, line, recordings, number) for number, line in records(recordings)]
    wanted: list[tuple[Wanted, str, str]] = []
    for number, line in records(texts):
        one = checked(Wanted, line, texts, number)
        try:
            wanted.append((one, *one.task))
        except UserError as error:
            raise bad_line(texts, number, error.message.removesuffix(".")) from error
    if not wanted:
        raise UserError(f"{texts} holds no texts.", code="invalid_dataset")
    rng, cases, said = np.random.default_rng(seed), [], set[tuple[int, str]]()
    for number in range(count):
        place = number % len(wanted)
        text, task, label = wanted[place]
        fitting = [voice for voice in voices if voice.language == text.language and voice.text != text.text]
        if not fitting:
            raise UserError(f"{recordings} has no other recording of the language {text.language!r}.",
                            code="invalid_dataset")  # fmt: skip
        fresh = [voice for voice in fitting if (place, voice.id) not in said]
        if not fresh:
            continue
        voice = fresh[int(rng.integers(len(fresh)))]
        said.add((place, voice.id))
        cases.append(Case.model_validate({
            "id": number, "speaker": voice.speaker, "gen_text": text.text, "prompt_text": voice.text,
            "prompt_audio": f"{voice.id}{voice.audio.suffix}", "lang": voice.language, "task": task, "task_sub": label,
        }))  # fmt: skip
        target = folder / cases[-1].prompt_audio
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            read_audio(recordings.parent / voice.audio)
            shutil.copyfile(recordings.parent / voice.audio, target)
        except UserError as error:
            raise UserError(f"{recordings}, recording {voice.id}: {error.message}", code="bad_row") from error
    write_cases(cases, folder / "cases.jsonl")
    return len(read_cases(folder / "cases.jsonl"))
