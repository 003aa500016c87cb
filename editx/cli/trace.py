"""`editx trace`: what happened to a job, across all processes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from editx.cli.operations import stack_folder


def trace(
    job: Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")],
    spans: Annotated[
        Path | None, typer.Option("--spans", help="The file of spans; that of the local stack by default.")
    ] = None,
) -> int:
    """Print the spans of a job as a tree: when each began, how long it took, in which process."""
    from editx.trace import lines, read_spans, trees

    for line in lines(trees(read_spans(spans or stack_folder() / "spans.jsonl"), job)):
        typer.echo(line)
    return 0
