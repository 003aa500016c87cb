"""`editx dlq`: the dead letters of the bus."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from editx.cli import options
from editx.cli.operations import address

if TYPE_CHECKING:
    from shared.bus.port import Bus
    from shared.deadletters import DeadLetter

app = typer.Typer(help="List, show and replay messages that could not be processed.", no_args_is_help=True)

Letter = Annotated[str, typer.Argument(metavar="ID", help="As `editx dlq list` names it: failed/0/12.")]


@app.command("list")
def list_(as_json: options.JsonOption = False) -> None:
    """Show all dead letters, oldest first."""
    from shared.deadletters import dead_letters
    from shared.wiring import open_bus

    bus = open_bus(address("EDITX_BUS_URL"))
    try:
        documents = sorted((letter.document() for letter in dead_letters(bus)), key=lambda one: float(one["at"]))
    finally:
        bus.close()
    if as_json:
        typer.echo(json.dumps(documents, ensure_ascii=False))
        return
    table = Table("id", "at", "job", "code", "reason")
    for one in documents:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["at"]))
        table.add_row(one["id"], at, one["job_id"], one["code"], one["reason"])
    Console().print(table)


@app.command()
def show(letter: Letter) -> None:
    """Show one dead letter whole."""
    from shared.wiring import open_bus

    bus = open_bus(address("EDITX_BUS_URL"))
    try:
        typer.echo(json.dumps(_find(bus, letter).document(), ensure_ascii=False, indent=2))
    finally:
        bus.close()


@app.command()
def replay(letter: Letter) -> None:
    """Have a dead letter done again: a failed step as a new job, an unreadable message as it came."""
    from shared.deadletters import replay as play
    from shared.wiring import open_bus, open_jobs, open_store

    bus, jobs = open_bus(address("EDITX_BUS_URL")), open_jobs(address("EDITX_JOBS_URL"))
    try:
        job = play(_find(bus, letter), bus, jobs, open_store(address("EDITX_STORE_URL")))
    finally:
        bus.close()
        jobs.close()
    typer.echo(f"{letter} is the job {job.id} now." if job else f"{letter} went back to its topic.")


def _find(bus: Bus, name: str) -> DeadLetter:
    from shared.deadletters import dead_letters
    from shared.errors import UserError

    for letter in dead_letters(bus):
        if letter.id == name:
            return letter
    raise UserError(f"There is no dead letter {name}.", "See `editx dlq list`.")
