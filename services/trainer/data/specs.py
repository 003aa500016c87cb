"""A data set from a description: a small YAML or JSON document that says what to build, from what, under which name.

`kind` is one of KINDS; every build checks leaks against the sets named in `against`. Texts are JSONL lines of text,
language and manner; recordings are JSONL lines of id, audio, text, language, speaker, licence and origin.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from services.trainer.core.configs import with_entries
from services.trainer.core.plots import draw_histograms
from services.trainer.core.runs import write_json
from services.trainer.data import build
from services.trainer.data.checks import check_leaks, read_held_out
from services.trainer.data.manifest import ROWS, Dataset, OnBad, Refused, collect, find_audio, read_rows, version_folder
from services.trainer.data.margin import (
    LOWEST_THRESHOLD,
    Filtered,
    MarginScorer,
    Thresholds,
    keep_large_margins,
    known_category,
)
from services.trainer.data.preferences import (
    MARGINS,
    Candidate,
    Weights,
    furthest,
    make_pairs,
    read_ratings,
    scale_of,
    scores_of,
)
from services.trainer.data.rated_pairs import margin_of
from services.trainer.data.records import bad_line, checked, numbered_lines, records
from services.trainer.data.rows import Row, reason
from services.trainer.data.teachers import CloneApi, HttpTeacher, RecipeTeacher, Teacher
from services.trainer.data.work import KeptWork, Work
from shared.audio.io import Waveform, read_audio
from shared.checkpoints.manifest import sha256
from shared.errors import EditxError, UserError
from shared.tags import check_tag

BUILDING = ".building"
"""Where the rows of a build that is not done lie, beside the versions of its set."""
Kind = Literal["rows", "tts", "triplets", "paralinguistic", "sounds", "simple", "prompts", "preferences"]


class TeacherSpec(BaseModel):
    """A cloning API that speaks the data instead of the recipes' teacher; its key is no part of a description.

    `references` is JSONL of speaker, audio and, unless neutral, manner. Without it every speaker needs a recording of
    the corpus itself, which only sets of kind paralinguistic have.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(pattern=r"^https?://")
    licence: str = Field(min_length=1, description="Of what the API speaks.")
    references: Path | None = None
    timeout_s: float = Field(default=60.0, gt=0)


class Reference(BaseModel):
    """A recording of a speaker in a manner."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    speaker: str = Field(min_length=1)
    audio: Path
    manner: str = "neutral"


class Spec(BaseModel):
    """What to build. Paths are relative to the description's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    texts: Path | None = None
    recordings: Path | None = None
    rows: list[Path] = Field(
        default_factory=list, description="Sets or JSONL to put together, or the prompts of preferences."
    )
    candidates: Path | None = None
    ratings: list[Path] = Field(default_factory=list)
    speakers: dict[str, list[str]] = Field(default_factory=dict, description="Language to the teacher's speakers.")
    manners: list[str] = Field(default_factory=list, description='What prompts ask of recordings: "emotion/happy".')
    teacher: TeacherSpec | None = Field(default=None, description="None: the recipes' teacher.")
    keep_audio: bool = Field(default=False, description="Keep the recordings with the set, to listen to and judge.")
    count: int = Field(default=100, ge=1)
    seed: int = 0
    margin_scorer: Path | None = Field(default=None, description="What `editx data fit-margins` wrote, for triplets.")
    threshold: float | None = Field(
        default=None, ge=LOWEST_THRESHOLD, description="Rows under it are dropped: 6 for triplets, none for rows."
    )
    thresholds: dict[str, float] = Field(default_factory=dict, description="The same per category (emotion sad).")
    unfiltered: bool = Field(default=False, description="Keep triplets of every margin, to compare with.")
    preference_margin: float | None = Field(
        default=None, gt=0, description="Pairs are further apart; 3 for ratings from 1 to 5, 8 for 1 to 10."
    )
    pairs_per_prompt: int = Field(default=4, ge=1)
    weights: dict[str, float] = Field(default_factory=dict, description="Entries of Weights, for preferences.")
    against: list[Path] = Field(
        default_factory=list, description="Data sets and benchmarks (JSONL) that nothing may be of."
    )
    share_speakers: bool = False
    lowest_rate_hz: int = Field(default=16_000, description="Recordings of a lower rate are bad rows.")
    on_bad: Literal["skip", "fail"] = "fail"

    @field_validator("rows", mode="before")
    @classmethod
    def _one_or_several(cls, rows: object) -> object:
        return rows if isinstance(rows, list) else [rows]

    @field_validator("manners")
    @classmethod
    def _known_manners(cls, manners: list[str]) -> list[str]:
        for manner in manners:
            try:
                check_manner(manner)
            except UserError as error:
                raise ValueError(error.message) from error
        return manners

    @field_validator("thresholds")
    @classmethod
    def _of_categories(cls, thresholds: dict[str, float]) -> dict[str, float]:
        for category, value in thresholds.items():
            if not value >= LOWEST_THRESHOLD:
                raise ValueError(f"{category!r} is {value}, none may be under {LOWEST_THRESHOLD:g}")
        return {known_category(category): value for category, value in thresholds.items()}

    @model_validator(mode="after")
    def _margins_agree(self) -> Self:
        bounded = self.threshold is not None or bool(self.thresholds)
        if self.keep_audio and self.kind in ("rows", "preferences"):
            raise ValueError(f"a set of kind {self.kind} keeps the recordings that its rows have: no keep_audio")
        if bool(self.manners) != (self.kind == "prompts"):
            raise ValueError("manners are what a set of kind prompts asks for, and it needs some")
        if self.unfiltered and bounded:
            raise ValueError("unfiltered keeps every margin, and a threshold drops some: leave one out")
        if bounded and self.kind not in ("triplets", "rows"):
            raise ValueError(f"a set of kind {self.kind} has no margins that a threshold could be for")
        if (self.margin_scorer is not None or self.unfiltered) and self.kind != "triplets":
            raise ValueError("margin_scorer and unfiltered are for sets of kind triplets")
        if self.kind == "triplets" and self.margin_scorer is None and not self.unfiltered:
            raise ValueError("triplets are kept by their margin: name a margin_scorer (editx data fit-margins writes "
                             "one), or say unfiltered: true")  # fmt: skip
        return self

    @property
    def margin_thresholds(self) -> Thresholds | None:
        """Which margins are kept, None for a set that is not filtered."""
        if self.unfiltered or (self.kind != "triplets" and self.threshold is None and not self.thresholds):
            return None
        return Thresholds(LOWEST_THRESHOLD if self.threshold is None else self.threshold, self.thresholds)


@dataclass(frozen=True)
class Built:
    """A data set, and where it was filtered the margins by category before and after."""

    dataset: Dataset
    filtered: Filtered | None = None
    work: Work = field(default_factory=Work)

    def save(self, root: Path) -> Path:
        """Write the set below `root`, with margins.json and margins.png (before and after) beside its rows.

        What the build kept for going on is removed.
        """
        folder = self.dataset.save(root)
        if self.filtered is not None:
            sides = {"before": self.filtered.before, "after": self.filtered.after}
            write_json(folder / "margins.json", sides)
            drawn = {name: [m for margins in side.values() for m in margins] for name, side in sides.items()}
            draw_histograms(drawn, folder / "margins.png", f"margins of {self.dataset.name}, before and after")
        self.work.finish()
        return folder


def build_spec(
    document: dict[str, Any], folder: Path, tokenize: Callable[[], build.Tokenize],
    teacher: Callable[[], Teacher] = RecipeTeacher, *, key: str = "", root: Path | None = None,
    coded_by: Callable[[], str] = lambda: "",
) -> Built:  # fmt: skip
    """The data set; models and teacher are made only if the kind needs them. Raises UserError, Leak.

    `key` is the teacher's API key. With `root`, the folder of data sets, a killed build goes on from what it made there
    before, if neither the description nor its files nor the tokenizer (`coded_by`) have changed.
    """
    spec = parse_spec(document)
    made_by = spec.model_dump(mode="json", exclude_defaults=True)
    speaks = teacher if spec.teacher is None else partial(_http_teacher, spec.teacher, folder, key)
    work = _work(spec, folder, root, coded_by)
    rows = _rows(spec, folder, tokenize, speaks, work)
    dataset = collect(spec.name, rows, made_by=made_by, on_bad=spec.on_bad)
    filtered = None
    if spec.margin_thresholds is not None:
        kept = filtered = keep_large_margins(dataset.rows, spec.margin_thresholds)
        left = {row.id for row in kept.rows}
        weak = [Refused(number, row.id, f"its margin {row.margin:.2f} is under the threshold")
                for number, row in enumerate(dataset.rows, start=1) if row.id not in left]  # fmt: skip
        dataset = replace(dataset, rows=tuple(kept.rows), refused=(*dataset.refused, *weak))
    if not dataset.rows:
        why = "nothing was read"
        if dataset.refused:
            why = f"{len(dataset.refused)} were left out, the first because {dataset.refused[0].reason}"
        raise UserError(f"The set {spec.name} has no rows: {why}.", code="invalid_dataset")
    held_out = [read_held_out(folder / path, dataset.rows, tokenize) for path in spec.against]
    check_leaks(dataset.rows, held_out, speakers=not spec.share_speakers)
    folders = (work.folder,) if isinstance(work, KeptWork) else tuple(path.parent for path in _sets(spec, folder))
    return Built(replace(dataset, folders=folders), filtered, work)


def _sets(spec: Spec, folder: Path) -> list[Path]:
    """The files of rows that the set is put together from."""
    if not spec.rows and spec.kind in ("rows", "preferences"):
        raise UserError("The description lacks rows.", code="invalid_dataset")
    paths = [folder / path for path in spec.rows]
    return [version_folder(path) / ROWS if path.is_dir() else path for path in paths]


def _with_recordings(row: Row, home: Path) -> Row:
    """A row from elsewhere without the recordings that are not there."""
    sides = {name: getattr(row, name) for name in ("source", "target", "rejected")}
    lost = {name: side.model_copy(update={"audio": None}) for name, side in sides.items()
            if side is not None and side.audio is not None and find_audio(side.audio, [home]) is None}  # fmt: skip
    return row.model_copy(update=lost) if lost else row


def _work(spec: Spec, folder: Path, root: Path | None, coded_by: Callable[[], str]) -> Work:
    if root is None or spec.kind in ("rows", "preferences"):
        return Work()
    files = [spec.texts, spec.recordings, spec.margin_scorer, spec.teacher.references if spec.teacher else None]
    known = {str(name): sha256(folder / name) for name in files if name is not None and (folder / name).is_file()}
    made_from = spec.model_dump(mode="json", exclude={"against", "on_bad", "share_speakers"})
    return KeptWork(root / spec.name / BUILDING, {"spec": made_from, "files": known, "coded_by": coded_by()},
                    keep_audio=spec.keep_audio)  # fmt: skip


def _http_teacher(spec: TeacherSpec, folder: Path, key: str) -> Teacher:
    references: dict[str, dict[str, Waveform]] = {}
    if spec.references is not None:
        path = folder / spec.references
        for number, line in records(path):
            one = checked(Reference, line, path, number)
            try:
                references.setdefault(one.speaker, {})[one.manner] = read_audio(path.parent / one.audio)
            except EditxError as error:
                raise bad_line(path, number, error.message.rstrip(".")) from error
    return HttpTeacher(CloneApi(spec.url, key, spec.timeout_s), references, spec.licence)


def parse_spec(document: dict[str, Any]) -> Spec:
    """Raises UserError naming what is wrong."""
    try:
        return Spec.model_validate(document)
    except ValidationError as error:
        raise UserError(f"The description is wrong: {reason(error)}.", code="invalid_dataset") from error


def _rows(
    spec: Spec, folder: Path, tokenize: Callable[[], build.Tokenize], teacher: Callable[[], Teacher], work: Work
) -> Iterable[Row | Refused]:  # fmt: skip
    if spec.kind == "rows":
        return [row for path in _sets(spec, folder) for row in _imported(path, spec.on_bad)]
    if spec.kind == "preferences":
        return _preferences(spec, folder)
    if spec.kind == "paralinguistic":
        return build.paralinguistic(_recordings(spec, folder), teacher(), tokenize(), work=work)
    if spec.kind == "simple":
        return build.simple_edits(_recordings(spec, folder), tokenize(), seed=spec.seed, work=work)
    if spec.kind == "prompts":
        return build.prompts(_recordings(spec, folder), spec.manners, tokenize(), work=work)
    sentences, refused = _sentences(spec, folder)
    missing = {s.language for s in sentences} - {language for language, names in spec.speakers.items() if names}
    if missing:
        raise UserError(f"The description names no speakers for {', '.join(sorted(missing))}.", code="invalid_dataset")
    if not sentences:
        return refused
    return chain(refused, _spoken(spec, folder, sentences, teacher(), tokenize(), work))


def _imported(path: Path, on_bad: OnBad) -> list[Row | Refused]:
    read = read_rows(path, name=path.stem, on_bad=on_bad)
    return [*(_with_recordings(row, path.parent) for row in read.rows), *read.refused]


def _spoken(
    spec: Spec, folder: Path, sentences: list[build.Sentence], teacher: Teacher, tokenize: build.Tokenize, work: Work
) -> Iterator[Row | Refused]:  # fmt: skip
    make = {"tts": build.zero_shot, "sounds": build.made_sounds}.get(spec.kind)
    if make is not None:
        return make(teacher, sentences, spec.speakers, tokenize, count=spec.count, seed=spec.seed, work=work)
    margin = margin_of(MarginScorer.load(folder / spec.margin_scorer)) if spec.margin_scorer else None
    return build.triplets(
        teacher, sentences, spec.speakers, tokenize, margin, count=spec.count, seed=spec.seed, work=work
    )


def _sentences(spec: Spec, folder: Path) -> tuple[list[build.Sentence], list[Refused]]:
    """The texts that can be used, and the lines that cannot with their reasons."""
    path = _path(spec.texts, "texts", folder)
    good, refused = [], []
    for number, line in _lines(path):
        try:
            good.append(_sentence(_object(line), needs_manner=spec.kind == "triplets"))
        except (UserError, KeyError) as error:
            refused.append(Refused(number, "", f"{path.name}, line {number}: {_why(error)}"))
    return good, refused


def _sentence(line: dict[str, Any], needs_manner: bool) -> build.Sentence:
    text, language, manner = str(line["text"]), str(line["language"]), line.get("manner")
    if not text.strip():
        raise UserError("the text is blank", code="bad_row")
    if manner is None and needs_manner:
        raise UserError("a triplet's text needs the manner that it fits", code="bad_row")
    if manner is not None:
        check_manner(str(manner))
    return build.Sentence(text, language, manner)


def check_manner(manner: str) -> None:
    """Raises UserError for what is no emotion or style."""
    kind, _, detail = manner.partition("/")
    if kind not in ("emotion", "style"):
        raise UserError(f"the manner {manner!r} is neither an emotion/ nor a style/", code="bad_row")
    check_tag(kind, detail)


def _preferences(spec: Spec, folder: Path) -> list[Row | Refused]:
    asked = [row for path in _sets(spec, folder) for row in _imported(path, "fail")]
    prompts = {row.id: row for row in asked if isinstance(row, Row)}
    path = _path(spec.candidates, "candidates", folder)
    candidates: dict[str, Candidate] = {}
    refused: list[Row | Refused] = []
    for number, line in _lines(path):
        try:
            found = _object(line)
            one = Candidate.model_validate({k: found[k] for k in ("id", "prompt", "mixed") if k in found})
            if one.prompt not in prompts:
                raise UserError(f"it answers the unknown prompt {one.prompt!r}", code="bad_row")
            if one.id in candidates:
                raise UserError("its id is taken by another candidate", code="bad_row")
            candidates[one.id] = one
        except (UserError, ValidationError) as error:
            id = str(line.get("id", "")) if isinstance(line, dict) else ""
            refused.append(Refused(number, id, f"{path.name}, line {number}: {_why(error)}"))
    ratings = [rating for ratings in spec.ratings for rating in read_ratings(folder / ratings)]
    scores = scores_of(ratings, with_entries(Weights(), spec.weights, "weights"))
    margin = MARGINS[scale_of(ratings)] if spec.preference_margin is None else spec.preference_margin
    strangers = sorted(scores.keys() - candidates.keys() - {one.id for one in refused})
    refused += [Refused(0, name, "it was rated, and there is no candidate of that id") for name in strangers]
    pairs = make_pairs(prompts, [*candidates.values()], scores, margin=margin, per_prompt=spec.pairs_per_prompt,
                       rated_by=", ".join(sorted({rating.rater for rating in ratings})))  # fmt: skip
    if not pairs and not refused:
        raise UserError(
            f"No two candidates of a prompt are rated more than {margin:g} apart, the furthest are "
            f"{furthest([*candidates.values()], scores):.2f}.",
            "Draw more candidates, or set preference_margin.", "invalid_dataset",
        )  # fmt: skip
    return [*refused, *pairs]


def _recordings(spec: Spec, folder: Path) -> Iterator[build.Recording | Refused]:
    path = _path(spec.recordings, "recordings", folder)
    seen: set[str] = set()
    for number, line in _lines(path):
        id = str(line.get("id", "")) if isinstance(line, dict) else ""
        try:
            made = _recording(_object(line), path.parent, spec.lowest_rate_hz)
            if made.id in seen:
                raise UserError("its id is taken by another recording", code="bad_row")
            seen.add(made.id)
            yield made
        except (KeyError, EditxError, OSError) as error:
            yield Refused(number, id, f"{path.name}, line {number}: {_why(error)}")


def _recording(line: dict[str, Any], folder: Path, lowest_rate_hz: int) -> build.Recording:
    id, text, language, speaker = (str(line[k]) for k in ("id", "text", "language", "speaker"))
    if not text.strip():
        raise UserError("the text is blank", code="bad_row")
    waveform = read_audio(folder / line["audio"])
    rate = waveform.sample_rate_hz
    if line.get("sample_rate_hz", rate) != rate:
        raise UserError(f"{line['audio']} has {rate} Hz, its line says {line['sample_rate_hz']}", code="bad_row")
    if rate < lowest_rate_hz:
        raise UserError(f"{line['audio']} has {rate} Hz, codes need {lowest_rate_hz}", code="bad_row")
    return build.Recording(id, text, language, speaker, waveform, str(line["licence"]), str(line["origin"]))


def _lines(path: Path) -> list[tuple[int, Any]]:
    """Numbers and contents of the lines; a line that is no JSON comes as its error. Raises UserError without a file."""
    return [(number, _parsed(text)) for number, text in numbered_lines(path)]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        return error


def _object(line: Any) -> dict[str, Any]:
    if not isinstance(line, dict):
        raise UserError("it is no JSON object", code="bad_row")
    return line


def _why(error: Exception) -> str:
    return f"it has no {error.args[0]!r}" if isinstance(error, KeyError) else reason(error)


def _path(path: Path | None, name: str, folder: Path) -> Path:
    if path is None:
        raise UserError(f"The description lacks {name}.", code="invalid_dataset")
    return folder / path
