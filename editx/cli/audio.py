"""`editx edit` and `editx clone`: from the command line's words to runs, and from results to files and reports."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from editx.cli import options

STDIN = "-"


def edit(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="An audio file, a folder of them, or - for standard input.")
    ],
    out: options.OutOption = None,
    text: Annotated[str | None, typer.Option("--text", help="What is said in it; else a .txt beside the file.")] = None,
    emotion: Annotated[
        str | None, typer.Option("--emotion", help="happy, sad, ... or remove. `editx checkpoint info` lists all.")
    ] = None,
    style: Annotated[str | None, typer.Option("--style", help="whisper, child, news, ... or remove.")] = None,
    speed: Annotated[str | None, typer.Option("--speed", help='faster, slower, "more faster", "more slower".')] = None,
    denoise: Annotated[bool, typer.Option("--denoise", help="Remove noise.")] = False,
    vad: Annotated[bool, typer.Option("--vad", help="Cut silence out.")] = False,
    paralinguistic: Annotated[
        str | None, typer.Option("--paralinguistic", help='The new text with sounds: "Well [Laughter] yes."')
    ] = None,
    iterations: Annotated[int, typer.Option("--iterations", min=1, max=10, help="Apply it to its own result.")] = 1,
    checkpoint: options.CheckpointOption = "nano",
    device: options.DeviceOption = "cpu",
    seed: options.SeedOption = None,
    n_best: options.NBestOption = 1,
    steps: options.StepsOption = 10,
    temperature: options.TemperatureOption = None,
    asr: options.AsrOption = False,
    picture: options.PictureOption = None,
    as_json: options.JsonOption = False,
) -> int:
    """Edit a recording. Name exactly one edit; --iterations keeps every iteration beside the result."""
    from editx import api
    from editx.cli import runs

    wanted = api.edit_of(emotion, style, speed, denoise, vad, paralinguistic)
    settings = runs.Settings(
        checkpoint, device, seed, n_best, steps, temperature, iterations, asr=asr, picture=picture, as_json=as_json
    )
    if source == STDIN:
        return runs.run_one(sys.stdin.buffer, "stdin", out or STDIN, wanted, text, settings)
    path = Path(source)
    if path.is_dir():
        return runs.run_folder(path, out, wanted, text, settings)
    target = out or f"{path.stem}.edited.wav"
    return runs.run_one(path, path.name, target, wanted, text, settings)


def clone(
    reference: Annotated[str, typer.Argument(metavar="REF", help="An audio file, a stored voice's name, or -.")],
    text: Annotated[str, typer.Option("--text", help="What to say.")],
    ref_text: Annotated[str | None, typer.Option("--ref-text", help="What the reference says; else its .txt.")] = None,
    out: options.CloneOutOption = None,
    checkpoint: options.CheckpointOption = "nano",
    device: options.DeviceOption = "cpu",
    seed: options.SeedOption = None,
    n_best: options.NBestOption = 1,
    steps: options.StepsOption = 10,
    temperature: options.TemperatureOption = None,
    asr: options.AsrOption = False,
    picture: options.PictureOption = None,
    as_json: options.JsonOption = False,
) -> int:
    """Say a text with the voice of a reference recording."""
    from editx.api import make_edit
    from editx.cli import runs
    from editx.voices import VoiceBook

    wanted = make_edit("clone", target_text=text)
    settings = runs.Settings(
        checkpoint, device, seed, n_best, steps, temperature, 1, asr=asr, picture=picture, as_json=as_json
    )
    if reference == STDIN:
        return runs.run_one(sys.stdin.buffer, "stdin", out or STDIN, wanted, ref_text, settings)
    path = Path(reference)
    if not path.exists() and path.name == reference and not path.suffix:
        voice, book = VoiceBook().get(reference), VoiceBook()
        target = out or f"{reference}.cloned.wav"
        return runs.run_one(book.reference(reference), reference, target, wanted, ref_text or voice.text, settings)
    return runs.run_one(path, path.name, out or f"{path.stem}.cloned.wav", wanted, ref_text, settings)
