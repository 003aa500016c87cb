"""editx: speech editing and voice cloning. `edit`, `clone` and `load` are the whole of it for most uses.

>>> from editx import edit
>>> result = edit("in.wav", text="What the recording says.", emotion="happy")  # doctest: +SKIP
>>> result.save("out.wav")  # doctest: +SKIP
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from editx.api import Editor, Result, clone, edit, load

__all__ = ["Editor", "Result", "clone", "edit", "load"]

for _package in ("editx", "services", "shared"):
    logging.getLogger(_package).addHandler(logging.NullHandler())  # a library is silent until its user sets logging up


def __getattr__(name: str) -> Any:
    """Import the API when it is first used: importing editx alone stays fast."""
    if name in __all__:
        from editx import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
