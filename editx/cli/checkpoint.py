"""`editx checkpoint`: what a checkpoint holds, whether it is whole, fetching the official one, replaying test vectors.

Only reads arguments and prints; the work is in `shared.checkpoints`. Imports no torch until a command needs it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from shared.checkpoints.layout import Checkpoint
from shared.errors import EditxError
from shared.tags import TAGS

if TYPE_CHECKING:
    from shared.checkpoints.verify import Report

app = typer.Typer(help="Look at, check, fetch and replay checkpoints.", no_args_is_help=True)

MOST_FINDINGS = 20
EXIT_DAMAGED = 3

Source = Annotated[str, typer.Argument(help="A name (nano, or one that was fetched) or a directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


class HubName(StrEnum):
    """The hubs that publish the official release."""

    HUGGINGFACE = "huggingface"
    MODELSCOPE = "modelscope"


COMPONENTS = {
    "language model": "step1_files",
    "text tokenizer": "text_tokenizer_file",
    "flow": "flow_file",
    "vocoder": "vocoder_file",
    "speaker encoder": "speaker_onnx",
    "linguistic encoder": "linguistic_file",
    "linguistic centroids": "centroids_file",
    "semantic tokenizer": "semantic_onnx",
}


@app.command()
def info(checkpoint: Source = "nano", as_json: AsJson = False) -> None:
    """Where a checkpoint lies, what it was trained on and how large its parts are."""
    from shared.checkpoints.fetch import read_lock

    found = Checkpoint.resolve(checkpoint)
    metadata, lock = found.metadata, read_lock(found.root)
    components = COMPONENTS | ({"recogniser": "recognizer_file"} if found.has_recognizer else {})
    document: dict[str, Any] = {
        "root": str(found.root),
        "metadata": metadata.model_dump(mode="json"),
        "revisions": {folder: f"{part.repository}@{part.revision}" for folder, part in lock.folders.items()}
        if lock
        else {},
        "components": {name: _component(found, attribute) for name, attribute in components.items()},
    }
    if as_json:
        _print_json(document)
        return
    console = Console()
    console.print(f"[bold]{metadata.name}[/] {metadata.version}  {found.root}", highlight=False)
    for folder, revision in document["revisions"].items():
        console.print(f"{folder}: {revision}", highlight=False)
    if metadata.trained_on is None:
        published = {"clone": True, **{kind: tuple(tags) for kind, tags in TAGS.items()}, "denoise": True, "vad": True}
        console.print(f"Trained on: not stated; taken to know every published edit: {_listed(published)}", markup=False)
    else:
        console.print(f"Trained on: {_listed(metadata.trained_on.model_dump())}", markup=False)
    table = Table("component", Column("file", overflow="fold"), "MB")
    for name, part in document["components"].items():
        size = f"{part['bytes'] / 1e6:.1f}" if part["files"] else ""
        table.add_row(name, "\n".join(part["files"]) or f"[red]{part['missing']}[/]", size)
    console.print(table)


@app.command()
def verify(
    checkpoint: Source = "nano",
    as_json: AsJson = False,
    hashes: Annotated[bool, typer.Option(help="Read every file and compare it with SHA256SUMS.")] = True,
) -> None:
    """Check files, tensor names, shapes and types against what the checkpoint's own config files imply."""
    from shared.checkpoints.verify import verify as check

    report = check(Checkpoint.resolve(checkpoint), hashes=hashes)
    if as_json:
        _print_json(report.document())
    else:
        _print_report(report)
    if not report.ok:
        raise typer.Exit(EXIT_DAMAGED)


@app.command()
def fetch(
    release: Annotated[str, typer.Argument(help="The release to fetch.")] = "official",
    to: Annotated[
        Path | None, typer.Option(help="Folder for it; by default the checkpoints folder of the user.")
    ] = None,
    source: Annotated[HubName, typer.Option("--from", help="The hub to fetch from.")] = HubName.HUGGINGFACE,
    endpoint: Annotated[str | None, typer.Option(help="Address of a mirror of the hub.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the language model's repository.")] = None,
    update: Annotated[bool, typer.Option(help="Take the newest commits instead of the locked ones.")] = False,
    as_json: AsJson = False,
) -> None:
    """Download the official release, about 10 GB: pinned to commits, resumable, every file checked."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from shared.checkpoints.fetch import fetch as bring

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), disable=as_json)
    tasks: dict[str, Any] = {}

    def show(path: str, done: int, total: int) -> None:
        bar.start()
        if path not in tasks:
            tasks[path] = bar.add_task(path, total=total)
        bar.update(tasks[path], completed=done)

    try:
        root = bring(
            release, to, source=source.value, endpoint=endpoint, revision=revision, update=update, progress=show
        )
    finally:
        if tasks:
            bar.stop()
    if as_json:
        _print_json({"root": str(root)})
    else:
        Console().print(f"{root} is complete. Check it with: editx checkpoint verify {root}", highlight=False)


@app.command()
def replay(
    folder: Annotated[
        Path, typer.Argument(help="A folder with a component and its inputs, such as tests/data/golden/*.")
    ],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    as_json: AsJson = False,
) -> None:
    """Run the component in a folder on the inputs beside it and write its outputs."""
    from shared.checkpoints.replay import replay as run

    result = run(folder, out)
    if as_json:
        _print_json(
            {"kind": result.kind, "out": str(out), "outputs": {name: list(s) for name, s in result.shapes.items()}}
        )
        return
    table = Table("output", "shape", title=result.kind)
    for name, shape in result.shapes.items():
        table.add_row(name, " x ".join(map(str, shape)))
    Console().print(table)
    Console().print(f"Written to {out}", highlight=False)


def _component(checkpoint: Checkpoint, attribute: str) -> dict[str, Any]:
    try:
        found = getattr(checkpoint, attribute)
    except EditxError as error:
        return {"files": [], "bytes": 0, "missing": error.message}
    files = found if isinstance(found, tuple) else (found,)
    names = [
        str(path.relative_to(checkpoint.root)) if path.is_relative_to(checkpoint.root) else str(path) for path in files
    ]
    return {"files": names, "bytes": sum(path.stat().st_size for path in files), "missing": None}


def _listed(edits: Mapping[str, object]) -> str:
    """The kinds of edit that are there, each with its tags."""
    return "; ".join(
        f"{kind} ({', '.join(map(str, value))})" if isinstance(value, tuple) else kind
        for kind, value in edits.items()
        if value
    )


def _print_report(report: Report) -> None:
    console = Console()
    table = Table("component", "", "tensors", "parameters", "type", title=f"{report.name}  {report.root}")
    for part in report.components:
        verdict = "[green]ok[/]" if part.ok else f"[red]{len(part.findings)} problem{'s' * (len(part.findings) > 1)}[/]"
        numbers = (str(part.tensors), f"{part.parameters:,}") if part.tensors else ("", "")
        table.add_row(part.name, verdict, *numbers, part.dtype)
    console.print(table)
    for part in report.components:
        for finding in part.findings[:MOST_FINDINGS]:
            console.print(
                f"{part.name}: {finding.problem}: {finding.what}  {finding.detail}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        if len(part.findings) > MOST_FINDINGS:
            console.print(f"{part.name}: {len(part.findings) - MOST_FINDINGS} more; --json lists all", highlight=False)


def _print_json(document: object) -> None:
    typer.echo(json.dumps(document, indent=2))
