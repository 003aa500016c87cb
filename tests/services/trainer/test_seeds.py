"""Several seeds of one benchmark: cases are averaged before intervals are drawn, and gains are paired by case."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from services.trainer.evaluate.benchmark import Case
from services.trainer.evaluate.report import over_seeds, seeds_table, steps_table, summarise, write_report
from services.trainer.evaluate.runner import add_measures
from shared.audio.io import Waveform, write_audio
from tests.services.trainer.test_data import RATE, tone


def line(key: str, scores: list[float], **more: float) -> dict:
    iterations = [{"iteration": n, "score": s, "rating": 5.0, "duration_ratio": 1.0, "label": "x", **more}
                  for n, s in enumerate(scores)]  # fmt: skip
    return {"key": key, "task": "emotion", "lang": "en", "iterations": iterations}


FIRST = [line("a", [0.0, 1.0], words=4.0, word_errors=1.0), line("b", [0.0, 0.0], words=4.0, word_errors=3.0)]
SECOND = [line("a", [1.0, 1.0]), line("b", [0.0, 1.0])]


def test_a_cases_numbers_are_means_over_the_seeds_that_have_them() -> None:
    merged = over_seeds([FIRST, SECOND])
    assert [[one["score"] for one in case["iterations"]] for case in merged] == [[0.5, 1.0], [0.0, 0.5]]
    rows = summarise(merged)
    assert [row["score"].mean for row in rows] == [25.0, 75.0]
    assert [row["cases"] for row in rows] == [2, 2]
    assert rows[0]["wer"] == pytest.approx(50.0)


def test_a_case_that_failed_or_is_missing_with_some_seed_is_not_averaged() -> None:
    failed = {"key": "a", "task": "emotion", "lang": "en", "error": "no tokens"}
    assert [("error" in one) for one in over_seeds([FIRST, [failed, SECOND[1]]])] == [True, False]
    assert [one["key"] for one in over_seeds([FIRST, SECOND[1:]])] == ["b"]


def test_gains_are_paired_and_seeds_are_shown(tmp_path: Path) -> None:
    better = [line("a", [0.0, 1.0]), line("b", [0.0, 1.0])]
    systems = {"sft": FIRST, "ppo": better}
    table = steps_table(systems, [("sft", "ppo"), ("ppo", "absent")])
    assert "| emotion | ppo | sft | 0.0 [0.0, 0.0] | 50.0 [0.0, 100.0] |" in table
    assert "| emotion | sft | its Iter0 | 0 | 50.0 [0.0, 100.0] |" in table
    assert "absent" not in table
    assert "| emotion | sft | 50.0, 100.0 | 35.4 |" in seeds_table({"sft": [FIRST, SECOND], "ppo": [better]})
    report = write_report(systems, tmp_path, steps=[("sft", "ppo")], seeds={"sft": [FIRST, SECOND]}).read_text()
    assert "## Gains" in report
    assert "## By seed" in report


def test_measuring_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    waveform = Waveform(tone(0.5), RATE)
    write_audio(waveform, tmp_path / "case.wav", "wav")
    write_audio(waveform, tmp_path / "prompt.wav", "wav")
    cases = [Case(id=str(k), speaker="ann", gen_text=f"text {k}", prompt_audio="prompt.wav", prompt_text="words",
                  lang="en", task="emotion", task_sub="happy") for k in range(3)]  # fmt: skip
    lines = [{**case.model_dump(), "key": case.key, "iterations": [{"audio": "case.wav"}]} for case in cases]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))

    class Measures:
        asked = 0

        def measure(self, text: str, language: str, reference: np.ndarray, audio: np.ndarray) -> dict[str, float]:
            self.asked += 1
            if self.asked == 3:
                raise KeyboardInterrupt
            return {"words": 2.0, "word_errors": 0.0}

    measures, known = Measures(), [(case, tmp_path / "prompt.wav") for case in cases]
    with pytest.raises(KeyboardInterrupt):
        add_measures(known, tmp_path, measures)
    assert add_measures(known, tmp_path, measures) == 1
    assert measures.asked == 4
