"""`editx stack`: the whole constellation on this machine, without containers."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from editx.cli import options
from editx.cli.operations import open_stack

app = typer.Typer(help="Run broker, store, Redis, Triton, workers and gateway on this machine.", no_args_is_help=True)


@app.command()
def up(
    checkpoint: options.CheckpointOption = "nano",
    workers: Annotated[int, typer.Option("--workers", min=1, max=16, help="Processes of each worker service.")] = 1,
    inference: Annotated[
        str, typer.Option("--inference", help="triton; local (models inside the workers); null (no models).")
    ] = "triton",
    port: Annotated[int, typer.Option("--port", help="The first of the ports that are used.")] = 18_000,
    gateway: Annotated[bool, typer.Option("--gateway/--no-gateway", help="Serve HTTP as well.")] = True,
) -> None:
    """Start it, and return when everything answers."""
    from editx.stack.stack import Options
    from shared.errors import UserError

    if inference not in ("triton", "local", "null"):
        raise UserError(f"--inference {inference} is unknown.", "Use triton, local or null.")
    began = time.monotonic()
    chosen = Options(port=port, checkpoint=checkpoint, workers=workers, inference=inference, gateway=gateway)  # type: ignore[arg-type]
    stack = open_stack(chosen)
    stack.up()
    console = Console(stderr=True)
    console.print(f"The stack runs ({time.monotonic() - began:.0f} s); its files lie in {stack.folder}.", markup=False)
    for name, url in stack.urls.items():
        typer.echo(f"{name}={url}")


@app.command()
def down() -> None:
    """Stop it; what it keeps stays in its folder."""
    ended = open_stack().down()
    killed = [name for name, by_itself in ended.items() if not by_itself and name != "broker"]
    note = f"; killed: {', '.join(killed)}" if killed else ""
    Console(stderr=True).print(f"Stopped {len(ended)} processes{note}.", markup=False)


@app.command()
def status(as_json: options.JsonOption = False) -> None:
    """Show which processes run and answer. Exit code 4 if one does not."""
    states = open_stack().status()
    if as_json:
        typer.echo(json.dumps(states))
    else:
        table = Table("process", "state")
        for name, state in states.items():
            table.add_row(name, state)
        Console().print(table)
    if any(state != "running" for state in states.values()):
        raise typer.Exit(4)


@app.command()
def restart(
    name: Annotated[str, typer.Argument(help="A process, as `status` names it.")],
    kill: Annotated[bool, typer.Option("--kill", help="With SIGKILL, as a crash would.")] = False,
) -> None:
    """Stop one process and start it again."""
    open_stack().restart(name, kill=kill)


@app.command()
def logs(
    name: Annotated[str, typer.Argument(help="A process, as `status` names it.")],
    lines: Annotated[int, typer.Option("--lines", "-n", min=1)] = 50,
) -> None:
    """Show the end of a process's log."""
    from shared.errors import UserError

    path = open_stack().log(name)
    if not path.is_file():
        raise UserError(f"There is no log {path}.", "See `editx stack status` for the names.")
    typer.echo("\n".join(path.read_text(errors="replace").splitlines()[-lines:]))
