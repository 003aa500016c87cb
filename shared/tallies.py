"""What the models of this process count as they work: requests that a pass took together, and what caches answered.

The counts go out by OTLP (shared.telemetry) and with the metrics of a gateway that runs models itself, under the same
names. Knows no model, and nothing about who reads it.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Tally:
    """One count of the process, split by the values of `label`. `name` is OpenTelemetry's, with dots."""

    name: str
    label: str
    unit: str
    meaning: str


PASSES = Tally("editx.batch.passes", "model", "{pass}", "Passes of a model over a batch; decode steps of the llm")
ROWS = Tally("editx.batch.rows", "model", "{row}", "Requests in those passes; rows over passes: mean batch size")
HITS = Tally("editx.cache.hits", "cache", "{item}", "What a cache had: prompt tokens, recordings, jobs by their key")
MISSES = Tally("editx.cache.misses", "cache", "{item}", "What a cache was asked for and had not")
TALLIES = (PASSES, ROWS, HITS, MISSES)

_lock = threading.Lock()
_counts: dict[Tally, Counter[str]] = {tally: Counter() for tally in TALLIES}


def passed(model: str, rows: int) -> None:
    """Count one pass of a model over `rows` requests or sequences."""
    with _lock:
        _counts[PASSES][model] += 1
        _counts[ROWS][model] += rows


def looked_up(cache: str, *, hits: int, misses: int) -> None:
    """Count what a cache had and had not."""
    with _lock:
        _counts[HITS][cache] += hits
        _counts[MISSES][cache] += misses


def counts(tally: Tally) -> dict[str, int]:
    """What was counted so far, by the value of the tally's label."""
    with _lock:
        return dict(_counts[tally])
