"""`editx models`: what the model server serves."""

from __future__ import annotations

import json
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from editx.cli import options
from editx.cli.operations import address

if TYPE_CHECKING:
    from shared.inference.triton import TritonInference

app = typer.Typer(help="Load, unload and list the models of Triton.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="tokenizer, llm, decoder or reward.")]


@app.command("list")
def list_(as_json: options.JsonOption = False) -> None:
    """Show the models of the server's repositories."""
    with closing(_server()) as server:
        found = server.models()
    if as_json:
        typer.echo(json.dumps(found))
        return
    table = Table("model", "version", "state", "reason")
    for model in found:
        table.add_row(model["name"], model["version"], model["state"], model["reason"])
    Console().print(table)


@app.command()
def load(name: Name) -> None:
    """Load a model, or load it anew after its checkpoint changed; calls are served meanwhile."""
    with closing(_server()) as server:
        server.load(name)
    typer.echo(f"{name} is loaded.")


@app.command()
def unload(name: Name) -> None:
    """Take a model away once its running calls have ended."""
    with closing(_server()) as server:
        server.unload(name)
    typer.echo(f"{name} is unloaded.")


@app.command()
def write(
    to: Annotated[
        str | None,
        typer.Option(help="Write a whole repository there: a folder, or a bucket as s3://key:secret@host:port/bucket."),
    ] = None,
) -> None:
    """Write the models' configurations (config.pbtxt) from their descriptions again, or a repository of them all."""
    from editx.stack.models import write_configurations, write_repository

    for path in write_configurations() if to is None else write_repository(to):
        typer.echo(str(path))


def _server() -> TritonInference:
    from shared.inference.triton import connect

    return connect(address("EDITX_INFERENCE_URL"))
