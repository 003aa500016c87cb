"""The commands put together, and what becomes of errors: a message for people or JSON, and an exit code."""

from __future__ import annotations

import errno
import functools
import importlib
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import ParamSpec

import typer
from rich.console import Console

from editx.cli import audio, doctor, remote, serve, tokens, trace
from shared.errors import EditxError, UserError

EXIT_MISSING = 3
EXIT_OUTPUT = 6
EXIT_INTERRUPTED = 130
LOG_VARIABLE = "EDITX_LOG_LEVEL"

_EXITS = {
    "missing_component": EXIT_MISSING,
    "checkpoint_not_found": EXIT_MISSING,
    "checkpoint_invalid": EXIT_MISSING,
    "disk_full": EXIT_OUTPUT,
    "cannot_write": EXIT_OUTPUT,
    "store_unavailable": EXIT_OUTPUT,
    "cancelled": EXIT_INTERRUPTED,
}

app = typer.Typer(
    name="editx",
    help="Edit how a recording sounds (emotion, style, speed, noise, silence, laughter) and clone voices.",
    epilog="Exit codes: 0 done, 1 failed, 2 bad input, 3 checkpoint or package missing, 4 unavailable for now, "
    "5 some files of a batch failed, 6 result not written, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
P = ParamSpec("P")


def _exiting(command: Callable[P, int]) -> Callable[P, None]:
    """A command whose return value becomes the exit code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        raise typer.Exit(command(*args, **kwargs))

    return wrapped


COMMANDS = (audio.edit, audio.clone, tokens.tokenize, tokens.decode, doctor.doctor, serve.serve, trace.trace)
for _command in COMMANDS:
    app.command()(_exiting(_command))
app.callback()(remote.options)
GROUPS = {
    "voices": "editx.cli.voices",
    "checkpoint": "editx.cli.checkpoint",
    "stack": "editx.cli.stack",
    "models": "editx.cli.models",
    "dlq": "editx.cli.dlq",
    "data": "editx.cli.data",
    "train": "editx.cli.train",
    "eval": "editx.cli.evaluate",
}
"""Commands with commands of their own: their name to the module whose `app` holds them.

A module is imported for its own command, and for the help of all; it imports torch inside its functions only.
"""


def _mount_groups(arguments: Sequence[str]) -> None:
    """Mount the group that is called, or all of them where another word or none comes first."""
    first = next(iter(arguments), "")
    if first in {command.__name__ for command in COMMANDS}:
        return
    mounted = {group.name for group in app.registered_groups}
    for name in [first] if first in GROUPS else GROUPS:
        if name not in mounted:
            app.add_typer(importlib.import_module(GROUPS[name]).app, name=name)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; the exit code."""
    _mount_groups(arguments)
    if level := os.environ.get(LOG_VARIABLE):
        known = logging.getLevelNamesMapping()
        logging.basicConfig(
            level=known.get(level.upper(), logging.INFO), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # so that temporary folders go
    try:
        app(list(arguments), prog_name="editx")
    except EditxError as error:
        return _tell(error, "--json" in arguments)
    except OSError as error:
        logging.getLogger(__name__).debug("stopped by the operating system", exc_info=error)
        return _tell(_translated(error), "--json" in arguments)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    if code == EXIT_INTERRUPTED:
        Console(stderr=True).print("Interrupted; nothing was left half written.", highlight=False)
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _translated(error: OSError) -> UserError:
    """An error of the operating system that nothing closer to it has explained: a file, a permission, a disk."""
    where = f"{error.filename}: " if error.filename else ""
    code = "disk_full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "not_accessible"
    hint = f"Check that it is there and may be used; {LOG_VARIABLE}=debug shows where it happened."
    return UserError(f"{where}{error.strerror or error}.", hint, code)


def exit_code(error: EditxError) -> int:
    """The exit code of an error: by its code where that says more than its class."""
    return _EXITS.get(error.code, error.exit_code)


def _tell(error: EditxError, as_json: bool) -> int:
    if as_json:
        typer.echo(json.dumps({"error": error.document()}, ensure_ascii=False))
    else:
        console = Console(stderr=True, soft_wrap=True)
        console.print(f"[red]Error:[/] {_escaped(error.message)}", highlight=False)
        if error.hint:
            console.print(_escaped(error.hint), highlight=False)
    return exit_code(error)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
