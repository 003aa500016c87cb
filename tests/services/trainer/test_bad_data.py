"""Bad data is named with its row and reason, and skipped or fatal as the description says; nothing goes silently."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from services.trainer.data.manifest import Dataset
from services.trainer.data.margin import MarginScorer
from services.trainer.data.specs import build_spec
from services.trainer.evaluate.acoustic import PAIR_FEATURES, AcousticJudge, Classifier
from shared.errors import UserError
from tests.services.trainer.conftest import make_row
from tests.services.trainer.test_data import RATE, Voice, tokenize, tone

GOOD = {"id": "good", "audio": "good.wav", "text": "well [Laughter] then", "language": "en", "speaker": "ann",
        "licence": "CC0-1.0", "origin": "tones"}  # fmt: skip


def build(kind: str, folder: Path, on_bad: str, **entries: Any) -> Dataset:
    document = {"kind": kind, "name": "set", "on_bad": on_bad, **entries}
    return build_spec(document, folder, lambda: tokenize, Voice).dataset


def write(path: Path, lines: list[Any]) -> None:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "good.wav", tone(1.0), RATE)
    soundfile.write(tmp_path / "low.wav", tone(1.0)[::3], 8_000)
    soundfile.write(tmp_path / "nan.wav", np.full(RATE, np.nan, np.float32), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE, np.float32), RATE)
    (tmp_path / "text.wav").write_text("no sound")
    return tmp_path


BAD_RECORDINGS: dict[str, tuple[Any, str]] = {
    "missing file": ({"audio": "nowhere.wav"}, "nowhere.wav"),
    "not audio": ({"audio": "text.wav"}, "text.wav"),
    "wrong rate": ({"audio": "low.wav"}, "low.wav has 8000 Hz, codes need 16000"),
    "other rate than said": ({"sample_rate_hz": 22_050}, f"has {RATE} Hz, its line says 22050"),
    "empty text": ({"text": "  "}, "the text is blank"),
    "NaN audio": ({"audio": "nan.wav"}, "nan.wav"),
    "silence": ({"audio": "silent.wav"}, "silent.wav"),
    "duplicate id": ({"id": "good"}, "its id is taken by another recording"),
    "missing entry": ({"speaker": None}, "it has no 'speaker'"),
    "no JSON": ("{", "it is no JSON object"),
}


@pytest.mark.parametrize("kind", ["simple", "paralinguistic"])
@pytest.mark.parametrize(("change", "why"), BAD_RECORDINGS.values(), ids=[*BAD_RECORDINGS])
def test_a_bad_recording_is_named_and_skipped_or_fatal(kind: str, change: Any, why: str, folder: Path) -> None:
    bad: Any = change
    if isinstance(change, Mapping):
        bad = {k: v for k, v in (GOOD | {"id": "bad"} | change).items() if v is not None}
    write(folder / "recordings.jsonl", [GOOD, "", bad])
    with pytest.raises(UserError, match=r"Row 3 \(") as error:
        build(kind, folder, "fail", recordings="recordings.jsonl")
    assert why in error.value.message
    made = build(kind, folder, "skip", recordings="recordings.jsonl")
    assert made.rows
    assert {row.id.split("-")[1] for row in made.rows} == {"good"}
    (refused,) = made.refused
    assert refused.row == 3
    assert why in refused.reason
    assert why in json.dumps(made.manifest()["refused"], ensure_ascii=False)


def test_an_unknown_tag_in_a_tagged_text_is_named(folder: Path) -> None:
    write(folder / "recordings.jsonl", [GOOD, GOOD | {"id": "bad", "text": "well [Laughtr] then"}])
    with pytest.raises(UserError, match=r"Row 2 \(para-bad\).*Laughtr"):
        build("paralinguistic", folder, "fail", recordings="recordings.jsonl")
    made = build("paralinguistic", folder, "skip", recordings="recordings.jsonl")
    assert [(one.row, one.id) for one in made.refused] == [(2, "para-bad")]


BAD_TEXTS: dict[str, tuple[Any, str]] = {
    "empty text": ({"text": " "}, "the text is blank"),
    "unknown tag": ({"manner": "emotion/hapy"}, "'hapy' is no known emotion tag"),
    "unknown kind": ({"manner": "mood/happy"}, "neither an emotion/ nor a style/"),
    "no manner": ({"manner": None}, "needs the manner that it fits"),
    "no language": ({"language": None}, "it has no 'language'"),
    "no JSON": ("happy", "it is no JSON object"),
}


@pytest.mark.parametrize(("change", "why"), BAD_TEXTS.values(), ids=[*BAD_TEXTS])
def test_a_bad_text_is_named_and_skipped_or_fatal(change: Any, why: str, folder: Path) -> None:
    good = {"text": "a happy one", "language": "en", "manner": "emotion/happy"}
    bad: Any = change
    if isinstance(change, Mapping):
        bad = {k: v for k, v in (good | change).items() if v is not None}
    write(folder / "texts.jsonl", [good, bad])
    entries: dict[str, Any] = {"texts": "texts.jsonl", "speakers": {"en": ["ann"]}, "count": 3, "unfiltered": True}
    with pytest.raises(UserError, match="Row 2") as error:
        build("triplets", folder, "fail", **entries)
    assert why in error.value.message
    made = build("triplets", folder, "skip", **entries)
    assert {row.source.text for row in made.rows} == {"a happy one"}
    assert made.refused[0].row == 2
    assert why in made.refused[0].reason


def test_a_set_without_a_usable_row_is_an_error_with_the_first_reason(folder: Path) -> None:
    write(folder / "recordings.jsonl", [GOOD | {"audio": "nowhere.wav"}])
    with pytest.raises(UserError, match=r"has no rows: 1 were left out, the first because .*nowhere\.wav"):
        build("simple", folder, "skip", recordings="recordings.jsonl")
    write(folder / "recordings.jsonl", [])
    with pytest.raises(UserError, match="nothing was read"):
        build("simple", folder, "skip", recordings="recordings.jsonl")


def test_bad_candidates_and_ratings_of_nobody_are_named(folder: Path) -> None:
    write(folder / "rows.jsonl", [make_row(0).model_dump_json()])
    codes = make_row(5).target.mixed.tolist()
    good = [{"id": f"c{k}", "prompt": "row-0", "mixed": make_row(5 + k).target.mixed.tolist()} for k in range(2)]
    bad = [{"id": "c1", "prompt": "row-0", "mixed": codes}, {"id": "x", "prompt": "row-9", "mixed": codes},
           {"id": "y", "prompt": "row-0", "mixed": [9999] * 5}]  # fmt: skip
    write(folder / "candidates.jsonl", [*good, *bad])
    ratings = [{"candidate": name, "rater": "ann", "correctness": score} for name, score in (("c0", 1), ("c1", 5))]
    write(folder / "ratings.jsonl", [*ratings, {"candidate": "ghost", "rater": "ann", "correctness": 3}])
    entries = {"rows": "rows.jsonl", "candidates": "candidates.jsonl", "ratings": ["ratings.jsonl"]}
    with pytest.raises(UserError, match=r"Row 3 \(c1\).*taken by another candidate"):
        build("preferences", folder, "fail", **entries)
    made = build("preferences", folder, "skip", **entries)
    assert [row.id for row in made.rows] == ["c1--c0"]
    found = {(one.row, one.id): one.reason for one in made.refused}
    assert found.keys() == {(3, "c1"), (4, "x"), (5, "y"), (0, "ghost")}
    assert "unknown prompt 'row-9'" in found[4, "x"]
    assert "no candidate" in found[0, "ghost"]


def test_the_weights_of_a_rating_are_the_descriptions(folder: Path) -> None:
    write(folder / "rows.jsonl", [make_row(0).model_dump_json()])
    write(folder / "candidates.jsonl", [
        {"id": f"c{k}", "prompt": "row-0", "mixed": make_row(5 + k).target.mixed.tolist()} for k in range(2)
    ])  # fmt: skip
    rated = [{"candidate": name, "rater": "ann", "correctness": 5, "naturalness": natural}
             for name, natural in (("c0", 1), ("c1", 5))]  # fmt: skip
    write(folder / "ratings.jsonl", rated)
    entries = {"rows": "rows.jsonl", "candidates": "candidates.jsonl", "ratings": ["ratings.jsonl"]}
    with pytest.raises(UserError, match=r"rated more than 3 apart, the furthest are 1\.14"):
        build("preferences", folder, "fail", **entries)
    (pair,) = build("preferences", folder, "fail", **entries, weights={"correctness": 0, "naturalness": 1}).rows
    assert (pair.id, pair.margin, pair.rated_by) == ("c1--c0", 4.0, "ann")
    with pytest.raises(UserError, match=r"weights\.beauty is no entry of Weights"):
        build("preferences", folder, "fail", **entries, weights={"beauty": 1})


def test_scorers_of_other_features_say_so(folder: Path) -> None:
    rng = np.random.default_rng(0)
    scorer = MarginScorer.fit(rng.normal(size=(40, 3)), ["emotion happy"] * 40, np.full(40, 3.0))
    with pytest.raises(UserError, match="knows 3 features, the pair has 15"):
        scorer.score(np.zeros(15), "emotion happy")
    judge = AcousticJudge({"emotion": Classifier.fit(rng.normal(size=(8, 3)), ["happy", "sad"] * 4)})
    judge.save(folder / "judge.json")
    with pytest.raises(UserError, match="other features"):
        AcousticJudge.load(folder / "judge.json")


def test_triplets_under_the_threshold_are_listed(folder: Path) -> None:
    rng = np.random.default_rng(0)
    pairs = rng.normal(size=(40, len(PAIR_FEATURES)))
    MarginScorer.fit(pairs, ["emotion happy"] * 40, np.full(40, 3.0)).save(folder / "margin.json")
    write(folder / "texts.jsonl", [{"text": "a happy one", "language": "en", "manner": "emotion/happy"}])
    with pytest.raises(UserError, match="the first because its margin 3"):
        build("triplets", folder, "skip", texts="texts.jsonl", speakers={"en": ["ann"]}, count=1,
              margin_scorer="margin.json")  # fmt: skip
