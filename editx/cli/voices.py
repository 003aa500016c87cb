"""`editx voices`: the stored voices of this machine's user."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from editx.cli import options

app = typer.Typer(help="Keep reference recordings under a name, for `editx clone NAME`.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The voice's name.")]


@app.command()
def add(
    name: Name,
    reference: Annotated[Path, typer.Argument(help="Its recording, best 3 to 15 seconds of clean speech.")],
    text: Annotated[str | None, typer.Option("--text", help="What it says; else a .txt beside the file.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a voice of this name.")] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Store a voice."""
    from editx.api import sidecar_text
    from editx.voices import VoiceBook
    from shared.audio.io import read_audio

    said = text or sidecar_text(reference) or ""
    voice = VoiceBook().add(name, read_audio(reference), said, replace=replace)
    if as_json:
        typer.echo(json.dumps(asdict(voice), ensure_ascii=False))
    else:
        Console(stderr=True).print(f"{name} is stored ({voice.duration_s:.2f} s).", markup=False, highlight=False)


@app.command("list")
def list_(as_json: options.JsonOption = False) -> None:
    """Show the stored voices."""
    from editx.voices import VoiceBook

    voices = VoiceBook().list()
    if as_json:
        typer.echo(json.dumps([asdict(voice) for voice in voices], ensure_ascii=False))
        return
    table = Table("voice", "seconds", "text")
    for voice in voices:
        table.add_row(voice.name, f"{voice.duration_s:.2f}", escape(voice.text))
    Console().print(table)


@app.command()
def remove(name: Name) -> None:
    """Delete a stored voice."""
    from editx.voices import VoiceBook

    VoiceBook().remove(name)
    Console(stderr=True).print(f"{name} is removed.", markup=False, highlight=False)
