"""The tree of a job's spans."""

import json
from pathlib import Path

import pytest

from editx.trace import JOB_ATTRIBUTE, lines, read_spans, trees
from shared.errors import UserError


def span(name: str, identity: str, parent: str | None, start: float, **facts: object) -> str:
    attributes = {JOB_ATTRIBUTE: "job_1", **facts.pop("attributes", {})}  # type: ignore[dict-item]
    document = {
        "name": name, "service": "editx-llm", "trace_id": "t", "span_id": identity, "parent_id": parent, "start": start,
        "seconds": 0.5, "status": "OK", "attributes": attributes, **facts,
    }  # fmt: skip
    return json.dumps(document)


def test_spans_form_a_tree_by_parent_and_time(tmp_path: Path) -> None:
    path = tmp_path / "spans.jsonl"
    failed = span("process b", "3", "1", 12.0, status="ERROR", attributes={"error.type": "away", "editx.attempt": 2})
    path.write_text("\n".join([span("process c", "4", "2", 11.5), failed, span("send b", "2", "1", 11.0),
                               span("POST", "1", None, 10.0), '{"half of a li']))  # fmt: skip
    text = [line[42:] for line in lines(trees(read_spans(path), "job_1"))][1:]
    assert [line.strip() for line in text] == ["POST", "send b", "process c", "process b  (attempt 2, FAILED away)"]
    assert [len(line) - len(line.lstrip()) for line in text] == [0, 2, 4, 2]


def test_a_job_that_no_span_names_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "spans.jsonl").write_text(span("POST", "1", None, 10.0))
    with pytest.raises(UserError, match="job_9"):
        trees(read_spans(tmp_path / "spans.jsonl"), "job_9")
    with pytest.raises(UserError, match="nowhere"):
        read_spans(tmp_path / "nowhere")
