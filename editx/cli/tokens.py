"""`editx tokenize` and `editx decode`: between recordings and the files that hold their audio tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from editx.cli import options
from editx.cli.remote import open_local


def tokenize(
    source: Annotated[Path, typer.Argument(metavar="IN", help="An audio file.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The token file; IN.safetensors by default.")] = None,
    checkpoint: options.CheckpointOption = "nano",
    device: options.DeviceOption = "cpu",
    as_json: options.JsonOption = False,
) -> int:
    """Write a recording's linguistic and semantic codes, speaker embedding and mel to one file."""
    from shared.files import check_target, write_atomically

    target = out or Path(f"{source.stem}.safetensors")
    check_target(target)
    with open_local(checkpoint, device) as editor:
        tokens = editor.tokenize(source)
    write_atomically(target, tokens.to_bytes())
    report = {
        "output": str(target),
        "duration_s": round(tokens.duration_s, 3),
        "linguistic": len(tokens.linguistic),
        "semantic": len(tokens.semantic),
        "audio_tokens": len(tokens.mixed),
    }
    if as_json:
        typer.echo(json.dumps(report))
        return 0
    line = (
        f"{source} ({tokens.duration_s:.2f} s) -> {target}: {report['linguistic']} linguistic and"
        f" {report['semantic']} semantic codes, {report['audio_tokens']} audio tokens"
    )
    Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def decode(
    source: Annotated[Path, typer.Argument(metavar="TOKENS", help="A file from `editx tokenize`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="WAV, FLAC, MP3 or Opus by its suffix.")],
    reference: Annotated[
        Path | None, typer.Option("--reference", help="A token file whose voice to use instead of the tokens' own.")
    ] = None,
    checkpoint: options.CheckpointOption = "nano",
    device: options.DeviceOption = "cpu",
    seed: options.SeedOption = 0,
    steps: options.StepsOption = 10,
    as_json: options.JsonOption = False,
) -> int:
    """Turn audio tokens back into sound."""
    from editx.api import check_audio_target, save_audio

    check_audio_target(out)
    tokens, voice = _read(source), _read(reference) if reference else None
    with open_local(checkpoint, device) as editor:
        audio = editor.decode(tokens, voice, steps=steps, seed=seed or 0)
    save_audio(audio, out)
    report = {"output": str(out), "output_s": round(audio.duration_s, 3), "seed": seed or 0}
    if as_json:
        typer.echo(json.dumps(report))
        return 0
    line = f"{source} -> {out} ({audio.duration_s:.2f} s)"
    Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _read(path: Path):  # type: ignore[no-untyped-def]
    from shared.artifacts import Tokenized
    from shared.errors import PoisonError, UserError

    try:
        return Tokenized.from_bytes(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", "Name a file from `editx tokenize`.") from error
    except PoisonError as error:
        raise UserError(
            f"{path} is no token file: {error.message}", "Make it with `editx tokenize`.", "bad_tokens"
        ) from error
