"""Files that appear whole or not at all, and places that are checked before the work that fills them.

Knows nothing about what is in a file. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path

from shared.errors import UserError


def write_atomically(target: Path, data: bytes) -> None:
    """Writes a file by way of a temporary one beside it: readers see the old file or the whole new one.

    Raises UserError where the disk is full or the place cannot be written; nothing is left behind then.
    """
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"The disk is full: {len(data)} bytes for {target} could not be written.",
                            "Free some space or choose another place, then run it again.", "disk_full",
                            http_status=507) from error  # fmt: skip
        raise _not_writable(target, error.strerror or str(error)) from error


def check_target(target: Path) -> None:
    """Raise UserError where no file can be written: the folder is missing or closed, or `target` is a folder."""
    if target.is_dir():
        raise UserError(f"{target} is a folder.", "Name a file in it.", "cannot_write")
    if not target.parent.is_dir():
        raise UserError(f"The folder {target.parent} does not exist.", "Make it first.", "cannot_write")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise _not_writable(target, "no permission")


def make_folder(folder: Path) -> None:
    """Make a folder with its parents, if it is not there. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be made ({error.strerror}).", "Choose another place.",
                        "cannot_write") from error  # fmt: skip


def _not_writable(target: Path, reason: str) -> UserError:
    return UserError(f"{target} cannot be written ({reason}).",
                     "Check that its folder exists and that you may write there.", "cannot_write")  # fmt: skip
