"""The margin filter of `editx data build`: the paper's 6 by default, per category, contradictions refused, drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.trainer.data.margin import MarginScorer
from services.trainer.data.specs import Built, build_spec
from services.trainer.evaluate.acoustic import PAIR_FEATURES
from shared.errors import UserError
from tests.services.trainer.conftest import make_row
from tests.services.trainer.test_data import Voice, tokenize


def build(folder: Path, **entries: Any) -> Built:
    return build_spec({"name": "set", **entries}, folder, lambda: tokenize, Voice)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pairs = np.random.default_rng(0).normal(size=(40, len(PAIR_FEATURES)))
    categories = ["emotion happy"] * 20 + ["emotion sad"] * 20
    for name, happy in (("weak", 5.9), ("clear", 6.5)):
        MarginScorer.fit(pairs, categories, [happy] * 20 + [8.0] * 20).save(tmp_path / f"{name}.json")
    texts = [{"text": f"a {tag} one", "language": "en", "manner": f"emotion/{tag}"} for tag in ("happy", "sad")]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    rows = [make_row(k, margin=float(k)) for k in range(4, 10)]
    (tmp_path / "rows.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows))
    return tmp_path


TRIPLETS: dict[str, Any] = {"kind": "triplets", "texts": "texts.jsonl", "speakers": {"en": ["ann", "bob"]}, "count": 12}


def texts_of(built: Built) -> set[str]:
    return {row.source.text for row in built.dataset.rows}


def test_triplets_are_kept_from_6_on_unless_told_otherwise(folder: Path) -> None:
    assert texts_of(build(folder, **TRIPLETS, margin_scorer="weak.json")) == {"a sad one"}
    assert texts_of(build(folder, **TRIPLETS, margin_scorer="clear.json")) == {"a happy one", "a sad one"}
    assert texts_of(build(folder, **TRIPLETS, margin_scorer="weak.json", unfiltered=True)) == {
        "a happy one", "a sad one",
    }  # fmt: skip


def test_a_categorys_threshold_counts_without_a_general_one(folder: Path) -> None:
    stricter = build(folder, **TRIPLETS, margin_scorer="clear.json", thresholds={"emotion happy": 7.0})
    assert {row.category for row in stricter.dataset.rows} <= {"emotion sad", "emotion remove"}
    rows = build(folder, kind="rows", rows="rows.jsonl", thresholds={"emotion happy": 8.0})
    assert [row.margin for row in rows.dataset.rows] == [8.0, 9.0]
    assert len(build(folder, kind="rows", rows="rows.jsonl").dataset.rows) == 6


def test_margins_before_and_after_are_written_and_drawn(folder: Path) -> None:
    saved = build(folder, kind="rows", rows="rows.jsonl", threshold=7.0).save(folder / "sets")
    margins = json.loads((saved / "margins.json").read_text())
    assert margins == {"before": {"emotion happy": [4, 5, 6, 7, 8, 9]}, "after": {"emotion happy": [7, 8, 9]}}
    assert (saved / "margins.png").exists()


@pytest.mark.parametrize(("entries", "message"), [
    (TRIPLETS, "name a margin_scorer"),
    (TRIPLETS | {"margin_scorer": "clear.json", "threshold": 7.0, "unfiltered": True}, "leave one out"),
    (TRIPLETS | {"margin_scorer": "clear.json", "threshold": 5.9}, "threshold: Input should be greater"),
    (TRIPLETS | {"margin_scorer": "clear.json", "thresholds": {"emotion sad": 5.0}}, "none may be under 6"),
    (TRIPLETS | {"margin_scorer": "clear.json", "thresholds": {"emotion hapy": 7.0}}, "'hapy' is no known emotion"),
    ({"kind": "simple", "recordings": "r.jsonl", "threshold": 7.0}, "kind simple has no margins"),
    ({"kind": "rows", "rows": "rows.jsonl", "margin_scorer": "clear.json"}, "for sets of kind triplets"),
])  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(entries: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        build(folder, **entries)
