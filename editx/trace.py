"""The trace of a job as a tree, from the file to which processes append their spans.

Knows the form of shared.telemetry.span_document, and nothing about who wrote the spans.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import UserError

JOB_ATTRIBUTE = "messaging.message.conversation_id"


@dataclass
class Node:
    """A span and what happened inside it or because of it, by time."""

    span: dict[str, Any]
    children: list[Node] = field(default_factory=list)


def read_spans(path: Path) -> list[dict[str, Any]]:
    """The spans in a file, one JSON object a line; a line that is not whole is left out. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", "Give the spans file with --spans.") from error
    spans = []
    for line in lines:
        try:
            spans.append(json.loads(line))
        except ValueError:
            continue
    return spans


def trees(spans: Sequence[dict[str, Any]], job_id: str) -> list[Node]:
    """The span trees of a job, by start. Usually one; more where a step was published again by the sweeper."""
    traces = {span["trace_id"] for span in spans if span["attributes"].get(JOB_ATTRIBUTE) == job_id}
    nodes = {span["span_id"]: Node(span) for span in spans if span["trace_id"] in traces}
    if not nodes:
        raise UserError(f"No span names the job {job_id}.", "Is the spans file that of the stack which ran it?")
    roots: list[Node] = []
    for node in sorted(nodes.values(), key=lambda node: float(node.span["start"])):
        parent = nodes.get(node.span["parent_id"] or "")
        (parent.children if parent else roots).append(node)
    return roots


def lines(roots: Sequence[Node]) -> Iterator[str]:
    """The trees as text: milliseconds since the job's first span, duration, service, name, what is special."""
    start = min(float(root.span["start"]) for root in roots)
    yield "   start       took  service              span"
    for root in roots:
        yield from _lines(root, start, 0)


def _lines(node: Node, start: float, depth: int) -> Iterator[str]:
    span = node.span
    marks = [f"attempt {attempt}" for attempt in [span["attributes"].get("editx.attempt", 1)] if attempt > 1]
    marks += [f"{key.removeprefix('editx.')}={value}" for key, value in span["attributes"].items()
              if key in ("editx.batch_size", "http.route", "http.response.status_code")]  # fmt: skip
    marks += [f"FAILED {span['attributes'].get('error.type', '')}".rstrip()] if span["status"] == "ERROR" else []
    at_ms, took_ms = (float(span["start"]) - start) * 1e3, float(span["seconds"]) * 1e3
    note = f"  ({', '.join(marks)})" if marks else ""
    yield f"{at_ms:8.1f} {took_ms:10.1f}  {span['service'] or '':<20} {'  ' * depth}{span['name']}{note}"
    for child in node.children:
        yield from _lines(child, start, depth + 1)
