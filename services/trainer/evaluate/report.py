"""From results to a table: accuracy per iteration with bootstrap intervals, and its cost in words, voice and length.

Cases are resampled, not judgements, so that the iterations of a case stay together. Knows result lines, not how they
came to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from services.trainer.core.plots import draw_series
from shared.errors import UserError

RESAMPLES = 2000
Line = dict[str, Any]
Systems = Mapping[str, Sequence[Line]]
"""Name to results."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval and standard error."""

    mean: float
    low: float
    high: float
    error: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"


def bootstrap(values: npt.ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The interval of a mean of values (n,), by resampling them. Raises UserError without any."""
    data = np.asarray(values, np.float64)
    if not len(data):
        raise UserError("There is nothing to report on.", "Run the benchmark first.", "no_results")
    rng = np.random.default_rng(seed)
    means = data[rng.integers(0, len(data), (resamples, len(data)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(data.mean()), float(low), float(high), float(means.std()), len(data))


def paired(first: Sequence[Line], second: Sequence[Line], task: str, iteration: int) -> Interval:
    """How much better the second system is on the cases that both did, in points (percent for labels)."""
    ours, theirs = (_by_key(lines, task, iteration) for lines in (second, first))
    common = sorted(ours.keys() & theirs.keys())
    return bootstrap([ours[key] - theirs[key] for key in common])


def _by_key(lines: Sequence[Line], task: str, iteration: int) -> dict[str, float]:
    scale = 1.0 if task == "paralinguistic" else 100.0
    return {
        line["key"]: scale * line["iterations"][iteration]["score"]
        for line in lines if line["task"] == task and "iterations" in line and len(line["iterations"]) > iteration
    }  # fmt: skip


def summarise(lines: Sequence[Line]) -> list[Line]:
    """One line per task, language ("all" too) and iteration: score, WER, similarity, naturalness, length."""
    good = [line for line in lines if "iterations" in line]
    rows: list[Line] = []
    for task in sorted({line["task"] for line in good}):
        own = [line for line in good if line["task"] == task]
        languages = sorted({line["lang"] for line in own})
        for language in (languages if len(languages) > 1 else []) + ["all"]:
            part = [line for line in own if language in ("all", line["lang"])]
            for iteration in range(min(len(line["iterations"]) for line in part)):
                rows.append(_summary(part, task, language, iteration))
    return rows


def _summary(lines: Sequence[Line], task: str, language: str, iteration: int) -> Line:
    found = [line["iterations"][iteration] for line in lines]
    scale = 1.0 if task == "paralinguistic" else 100.0
    score = bootstrap([scale * one["score"] for one in found])
    row: Line = {"task": task, "language": language, "iteration": iteration, "cases": len(found), "score": score,
                 "duration_ratio": float(np.mean([one["duration_ratio"] for one in found]))}  # fmt: skip
    if all("words" in one for one in found):
        row["wer"] = 100 * sum(one["word_errors"] for one in found) / max(1.0, sum(one["words"] for one in found))
    for name in ("similarity", "naturalness"):
        if all(name in one for one in found):
            row[name] = float(np.mean([one[name] for one in found]))
    return row


def markdown(rows: Sequence[Line], title: str) -> str:
    """The summary as a table. Scores are percent (emotion, style) or 1 to 3 (paralinguistic)."""
    columns = [("wer", "WER %", "{:.1f}"), ("similarity", "similarity", "{:.3f}"), ("naturalness", "MOS", "{:.2f}"),
               ("duration_ratio", "length", "{:.2f}")]  # fmt: skip
    lines = [f"## {title}", "", "| task | language | iteration | cases | score [95 %] | " +
             " | ".join(name for _, name, _ in columns) + " |", "|" + "---|" * (5 + len(columns))]  # fmt: skip
    for row in rows:
        digits = 2 if row["task"] == "paralinguistic" else 1
        score: Interval = row["score"]
        shown = f"{score.mean:.{digits}f} [{score.low:.{digits}f}, {score.high:.{digits}f}]"
        extra = [form.format(row[key]) if key in row else "" for key, _, form in columns]
        cells = [row["task"], row["language"], f"Iter{row['iteration']}", row["cases"], shown, *extra]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def compare(systems: Systems) -> str:
    """Systems side by side: score per iteration, and the paired gain of each over the first at the last iteration."""
    names = list(systems)
    tasks = sorted({line["task"] for lines in systems.values() for line in lines if "iterations" in line})
    heads = " | ".join(f"Iter{n}" for n in range(_depth(systems)))
    text = [f"| task | system | {heads} | gain over {names[0]} |", "|" + "---|" * (3 + _depth(systems))]
    for task in tasks:
        for name in names:
            rows = [r for r in summarise(systems[name]) if r["task"] == task and r["language"] == "all"]
            if not rows:
                continue
            gain = "" if name == names[0] else str(paired(systems[names[0]], systems[name], task, len(rows) - 1))
            cells = [str(row["score"]) for row in rows] + [""] * (_depth(systems) - len(rows))
            text.append(f"| {task} | {name} | " + " | ".join(cells) + f" | {gain} |")
    return "\n".join(text) + "\n"


def over_seeds(runs: Sequence[Sequence[Line]]) -> list[Line]:
    """Runs of the same cases with other seeds as one: each number of a case is its mean over the seeds.

    Cases, not draws, are what intervals are about, so several draws of a case count as one better known case. Cases
    that failed with some seed are left out; those that failed with every one keep their error.
    """
    by_key: dict[str, list[Line]] = {}
    for lines in runs:
        for line in lines:
            by_key.setdefault(str(line["key"]), []).append(line)
    return [_mean_case(lines) for lines in by_key.values() if len(lines) == len(runs)]


def _mean_case(lines: Sequence[Line]) -> Line:
    failed = next((line for line in lines if "error" in line), None)
    if failed is not None:
        return failed
    iterations = []
    for found in zip(*(line["iterations"] for line in lines), strict=True):
        numbers = {n for one in found for n, v in one.items() if isinstance(v, int | float) and n != "iteration"}
        means = {n: float(np.mean([one[n] for one in found if n in one])) for n in sorted(numbers)}
        iterations.append({"iteration": found[0]["iteration"], **means})
    return {**lines[0], "iterations": iterations}


def steps_table(systems: Systems, steps: Sequence[tuple[str, str]]) -> str:
    """Paired gains in points with 95 % intervals: of each system from Iter0 to Iter1, and of each step's second system
    over its first at every iteration.
    """
    depth = _depth(systems)
    heads = " | ".join(f"Iter{n}" for n in range(depth))
    text = [f"| task | gain of | over | {heads} |", "|" + "---|" * (3 + depth)]
    for task in sorted({line["task"] for lines in systems.values() for line in lines if "iterations" in line}):
        for before, after in steps:
            if all(_by_key(systems.get(name, ()), task, 0) for name in (before, after)):
                gains = [str(paired(systems[before], systems[after], task, n)) for n in range(depth)]
                text.append(f"| {task} | {after} | {before} | " + " | ".join(gains) + " |")
        for name, lines in systems.items():
            first = _by_key(lines, task, 0)
            gains = []
            for n in range(1, depth if first else 0):
                later = _by_key(lines, task, n)
                gains.append(str(bootstrap([later[key] - first[key] for key in sorted(first.keys() & later.keys())])))
            if gains:
                text.append(f"| {task} | {name} | its Iter0 | 0 | " + " | ".join(gains) + " |")
    return "\n".join(text) + "\n"


def seeds_table(runs: Mapping[str, Sequence[Sequence[Line]]]) -> str:
    """The score at the last iteration by seed, and the deviation among seeds."""
    text = ["| task | system | score by seed | deviation |", "|---|---|---|---|"]
    tasks = sorted({line["task"] for seeds in runs.values() for one in seeds for line in one if "iterations" in line})
    for task in tasks:
        for name, seeds in runs.items():
            last = _depth({name: [line for one in seeds for line in one]}) - 1
            scores = [np.mean(list(found.values())) for one in seeds if (found := _by_key(one, task, last))]
            if len(scores) > 1:
                shown = ", ".join(f"{score:.1f}" for score in scores)
                text.append(f"| {task} | {name} | {shown} | {np.std(scores, ddof=1):.1f} |")
    return "\n".join(text) + "\n"


def _depth(systems: Systems) -> int:
    return max((len(line.get("iterations", ())) for lines in systems.values() for line in lines), default=0)


def draw(systems: Systems, folder: Path) -> None:
    """A picture per task: score over iterations with its interval, a line per system."""
    for task in sorted({line["task"] for lines in systems.values() for line in lines if "iterations" in line}):
        series = {}
        for name, lines in systems.items():
            rows = [row for row in summarise(lines) if row["task"] == task and row["language"] == "all"]
            if rows:
                series[name] = [(row["score"].low, row["score"].mean, row["score"].high) for row in rows]
        depth = max(len(points) for points in series.values())
        draw_series(series, [f"Iter{n}" for n in range(depth)], folder / f"{task}.png", task)


def write_report(
    systems: Systems, folder: Path, *, steps: Sequence[tuple[str, str]] = (),
    seeds: Mapping[str, Sequence[Sequence[Line]]] | None = None,
) -> Path:  # fmt: skip
    """report.md with one table per system and one that compares them, and the pictures beside it.

    `steps` are pairs of systems of which the second is to be better; `seeds` the runs that `systems` are means of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [markdown(summarise(lines), name) for name, lines in systems.items()]
    if len(systems) > 1:
        parts.append("## Compared\n\n" + compare(systems))
    if steps:
        parts.append("## Gains\n\n" + steps_table(systems, steps))
    if seeds:
        parts.append("## By seed\n\n" + seeds_table(seeds))
    failed = {name: sum("error" in line for line in lines) for name, lines in systems.items()}
    parts += [f"{name}: {count} cases failed; results.jsonl says why.\n" for name, count in failed.items() if count]
    draw(systems, folder)
    target = folder / "report.md"
    target.write_text("\n".join(parts), encoding="utf-8")
    return target
