"""A data set from a description: a small YAML or JSON document that says what to build, from what, under which name.

`kind` is one of KINDS; every build checks leaks against the sets named in `against`. Texts are JSONL lines of text,
language and manner; recordings are JSONL lines of id, audio, text, language, speaker, licence and origin.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.trainer.data import build
from services.trainer.data.checks import HeldOut, check_leaks
from services.trainer.data.manifest import Dataset, Refused, collect, read_rows
from services.trainer.data.margin import MarginScorer, Thresholds, keep_large_margins
from services.trainer.data.preferences import HUMAN_MARGIN, Candidate, Weights, make_pairs, read_ratings, scores_of
from services.trainer.data.rows import Row, reason
from services.trainer.data.teachers import RecipeTeacher, Teacher
from services.trainer.evaluate.acoustic import pair_features
from services.trainer.evaluate.runner import at_16k
from shared.audio.io import Waveform, read_audio
from shared.errors import EditxError, UserError

Kind = Literal["rows", "tts", "triplets", "paralinguistic", "sounds", "simple", "preferences"]


class Spec(BaseModel):
    """What to build. Paths are relative to the description's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    texts: Path | None = None
    recordings: Path | None = None
    rows: Path | None = Field(default=None, description="Rows to import, or the prompts of preferences.")
    candidates: Path | None = None
    ratings: list[Path] = Field(default_factory=list)
    speakers: dict[str, list[str]] = Field(default_factory=dict, description="Language to the teacher's speakers.")
    count: int = Field(default=100, ge=1)
    seed: int = 0
    margin_scorer: Path | None = None
    threshold: float | None = Field(default=None, description="Drop triplets under it; 6 at least.")
    thresholds: dict[str, float] = Field(default_factory=dict, description="The same per category.")
    preference_margin: float = HUMAN_MARGIN
    against: list[Path] = Field(default_factory=list, description="Evaluation sets that must not leak.")
    share_speakers: bool = False
    on_bad: Literal["skip", "fail"] = "fail"


def build_spec(
    document: dict[str, Any], folder: Path, tokenize: Callable[[], build.Tokenize],
    teacher: Callable[[], Teacher] = RecipeTeacher,
) -> Dataset:  # fmt: skip
    """The data set; models and teacher are made only if the kind needs them. Raises UserError, Leak."""
    try:
        spec = Spec.model_validate(document)
    except ValidationError as error:
        raise UserError(f"The description is wrong: {reason(error)}.", code="invalid_dataset") from error
    made_by = spec.model_dump(mode="json", exclude_defaults=True)
    dataset = collect(spec.name, _rows(spec, folder, tokenize, teacher), made_by=made_by, on_bad=spec.on_bad)
    if spec.threshold is not None:
        kept = keep_large_margins(dataset.rows, Thresholds(spec.threshold, spec.thresholds))
        dataset = Dataset(dataset.name, tuple(kept.rows), made_by, dataset.refused)
    held_out = [HeldOut.of(str(path), Dataset.load(folder / path).rows) for path in spec.against]
    check_leaks(dataset.rows, held_out, speakers=not spec.share_speakers)
    return dataset


def _rows(
    spec: Spec, folder: Path, tokenize: Callable[[], build.Tokenize], teacher: Callable[[], Teacher]
) -> Iterable[Row | Refused]:  # fmt: skip
    if spec.kind == "rows":
        read = read_rows(_path(spec.rows, "rows", folder), name=spec.name, on_bad=spec.on_bad)
        return [*read.rows, *read.refused]
    if spec.kind == "preferences":
        return _preferences(spec, folder)
    if spec.kind == "paralinguistic":
        return build.paralinguistic(_recordings(spec, folder), teacher(), tokenize())
    if spec.kind == "simple":
        return build.simple_edits(_recordings(spec, folder), tokenize(), seed=spec.seed)
    lines = _lines(_path(spec.texts, "texts", folder))
    sentences = [build.Sentence(line["text"], line["language"], line.get("manner")) for line in lines]
    missing = {s.language for s in sentences} - spec.speakers.keys()
    if missing:
        raise UserError(f"The description names no speakers for {', '.join(sorted(missing))}.", code="invalid_dataset")
    if spec.kind == "tts":
        return build.zero_shot(teacher(), sentences, spec.speakers, tokenize(), count=spec.count, seed=spec.seed)
    if spec.kind == "sounds":
        return build.made_sounds(teacher(), sentences, spec.speakers, tokenize(), count=spec.count, seed=spec.seed)
    margin = _margin(MarginScorer.load(folder / spec.margin_scorer)) if spec.margin_scorer else None
    return build.triplets(teacher(), sentences, spec.speakers, tokenize(), margin, count=spec.count, seed=spec.seed)


def _margin(scorer: MarginScorer) -> build.Margin:
    def margin(neutral: Waveform, expressive: Waveform, category: str) -> float:
        return scorer.score(pair_features(at_16k(neutral), at_16k(expressive)), category)

    return margin


def _preferences(spec: Spec, folder: Path) -> list[Row | Refused]:
    prompts = {row.id: row for row in Dataset.load(_path(spec.rows, "rows", folder)).rows}
    lines = _lines(_path(spec.candidates, "candidates", folder))
    candidates = [Candidate.model_validate({k: line[k] for k in ("id", "prompt", "mixed", "audio") if k in line})
                  for line in lines]  # fmt: skip
    ratings = [rating for path in spec.ratings for rating in read_ratings(folder / path)]
    scores = scores_of(ratings, Weights())
    return [*make_pairs(prompts, candidates, scores, margin=spec.preference_margin, rated_by="ratings")]


def _recordings(spec: Spec, folder: Path) -> Iterator[build.Recording]:
    path = _path(spec.recordings, "recordings", folder)
    for number, line in enumerate(_lines(path), start=1):
        try:
            waveform = read_audio(path.parent / line["audio"])
            id, text, language, speaker = (str(line[k]) for k in ("id", "text", "language", "speaker"))
            yield build.Recording(id, text, language, speaker, waveform, str(line["licence"]), str(line["origin"]))
        except (KeyError, EditxError, OSError) as error:
            if spec.on_bad == "fail":
                raise UserError(f"{path}, row {number}: {reason(error)}.", code="bad_row") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no JSONL file: {error}.", code="invalid_dataset") from error


def _path(path: Path | None, name: str, folder: Path) -> Path:
    if path is None:
        raise UserError(f"The description lacks {name}.", code="invalid_dataset")
    return folder / path
