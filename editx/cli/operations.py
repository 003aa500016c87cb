"""Where the commands for operators find the servers: settings, else the local stack."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from editx.stack.stack import Options, Stack

FOLDER_VARIABLE = "EDITX_STACK"


def stack_folder() -> Path:
    """The folder of the local stack: $EDITX_STACK, or runs/stack here."""
    return Path(os.environ.get(FOLDER_VARIABLE, "runs/stack"))


def open_stack(options: Options | None = None) -> Stack:
    """The local stack, with other options than last time if given."""
    from editx.stack.stack import Stack

    return Stack(stack_folder(), options)


def address(setting: str) -> str:
    """A server's URL: the environment variable `setting`, else that of the local stack."""
    return os.environ.get(setting) or open_stack().urls[setting]
