"""Pictures of a run: its curves, histograms. Needs matplotlib, and leaves a picture out where that is missing."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

COLUMNS = 3
HIDDEN = ("step", "s_per_step")


def _pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError:
        log.warning("matplotlib is not installed: no pictures are drawn (pip install editx[picture])")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_curves(log_file: Path, target: Path) -> None:
    """Every metric of a log.jsonl over its steps, a small panel each."""
    pyplot = _pyplot()
    if pyplot is None or not log_file.exists():
        return
    lines = [json.loads(line) for line in log_file.read_text().splitlines()]
    names = [name for name in dict.fromkeys(key for line in lines for key in line) if name not in HIDDEN]
    rows = -(-len(names) // COLUMNS)
    figure, axes = pyplot.subplots(max(rows, 1), COLUMNS, figsize=(4 * COLUMNS, 2.4 * max(rows, 1)), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
    for axis in list(axes.flat)[len(names) :]:
        axis.set_axis_off()
    _save(pyplot, figure, target)


def draw_histograms(groups: Mapping[str, Sequence[float]], target: Path, title: str, bins: int = 20) -> None:
    """Distributions over one axis, e.g. margins before and after a threshold."""
    pyplot = _pyplot()
    if pyplot is None or not any(len(values) for values in groups.values()):
        return
    figure, axis = pyplot.subplots(figsize=(6, 3.2))
    _distributions(axis, groups, bins)
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8)
    _save(pyplot, figure, target)


def draw_checks(checks: Sequence[Mapping[str, float]], target: Path) -> None:
    """The held-out reward and the judge's score over the same steps: where the curves part, the reward is hacked."""
    pyplot = _pyplot()
    if pyplot is None or not checks:
        return
    figure, axis = pyplot.subplots(figsize=(6, 3.2))
    steps, lines = [one["step"] for one in checks], []
    for place, name, color in ((axis, "reward", "tab:blue"), (axis.twinx(), "judge", "tab:orange")):
        lines += place.plot(steps, [one[name] for one in checks], marker="o", color=color, label=name)
        place.set_ylabel(name, color=color, fontsize=9)
    axis.set_xlabel("step", fontsize=9)
    axis.set_title("reward and judge on held-out prompts", fontsize=10)
    axis.legend(handles=lines, fontsize=8)
    _save(pyplot, figure, target)


def draw_overview(
    bars: Mapping[str, Mapping[str, float]], spreads: Mapping[str, Mapping[str, Sequence[float]]], target: Path,
    title: str, most: int = 12,
) -> None:  # fmt: skip
    """A panel for each title: the largest of its bars, or its distributions."""
    pyplot = _pyplot()
    if pyplot is None:
        return
    drawn = {name: groups for name, groups in spreads.items() if any(groups.values())}
    figure, axes = pyplot.subplots(
        len(bars) + len(drawn), 1, figsize=(7, 2.6 * (len(bars) + len(drawn))), squeeze=False
    )
    for axis, (name, values) in zip(axes.flat, bars.items(), strict=False):
        largest = sorted(values.items(), key=lambda pair: -pair[1])[:most]
        axis.bar([label for label, _ in largest], [value for _, value in largest])
        axis.tick_params(axis="x", labelrotation=30, labelsize=7)
        axis.set_title(f"{name} ({len(largest)} of {len(values)})", fontsize=9)
    for axis, (name, groups) in zip(list(axes.flat)[len(bars) :], drawn.items(), strict=True):
        _distributions(axis, groups, bins=20)
        axis.legend(fontsize=7)
        axis.set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=10)
    _save(pyplot, figure, target)


def draw_series(
    series: Mapping[str, Sequence[tuple[float, float, float]]], labels: Sequence[str], target: Path, title: str
) -> None:
    """Lines with intervals: name to (low, middle, high) per label."""
    pyplot = _pyplot()
    if pyplot is None or not series:
        return
    figure, axis = pyplot.subplots(figsize=(6, 3.6))
    for name, points in series.items():
        low, middle, high = zip(*points, strict=True)
        places = range(len(points))
        axis.plot(places, middle, marker="o", label=name)
        axis.fill_between(places, low, high, alpha=0.15)
    axis.set_xticks(range(len(labels)), labels)
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8)
    _save(pyplot, figure, target)


def _distributions(axis: Any, groups: Mapping[str, Sequence[float]], bins: int) -> None:
    everything = [value for values in groups.values() for value in values]
    span = (min(everything) - 1e-3, max(everything) + 1e-3)  # equal values still need an axis
    for name, values in groups.items():
        axis.hist(values, bins=bins, range=span, alpha=0.55, label=f"{name} ({len(values)})")


def _save(pyplot: Any, figure: Any, target: Path) -> None:
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
