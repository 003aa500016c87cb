"""How a call travels to a model server and back: parameters and errors as JSON, priorities as levels.

Both ends use it: the client and the shim that runs inside the server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from shared import errors
from shared.errors import EditxError, PermanentError, UserError
from shared.inference import port
from shared.inference.port import Parameters

CALL = "editx"
"""The request parameter that holds everything about a call but its tensors."""
SCALARS = "scalars"
"""The configuration parameter that names the outputs without an axis; the server knows none such."""
DEVICE = "device"
"""The configuration parameter that names the device to run on."""
PRIORITY_LEVELS = 10
"""Level 1 goes first, as in Triton; the default is the last."""


def level_of(priority: int) -> int:
    """The server's level of a priority of ours, where higher goes first."""
    return min(max(PRIORITY_LEVELS - priority, 1), PRIORITY_LEVELS)


@dataclass(frozen=True)
class Call:
    """Everything about a call but its tensors.

    `left_s` is the time until its deadline, `log_fields` what the caller's log lines carry (job_id).
    """

    parameters: Parameters
    streams: bool = False
    left_s: float | None = None
    priority: int = 0
    trace: Mapping[str, str] = field(default_factory=dict)
    log_fields: Mapping[str, object] = field(default_factory=dict)

    def pack(self) -> str:
        """The call as JSON text."""
        return json.dumps(
            {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(self).items()}
        )

    @classmethod
    def unpack(cls, text: str) -> Call:
        """The call that `pack` wrote."""
        return cls(**json.loads(text))


def pack_error(error: BaseException) -> str:
    """The JSON text of an exception; one that nobody foresaw becomes a PermanentError."""
    if not isinstance(error, EditxError):
        error = PermanentError(f"{type(error).__name__}: {error}", "See the model server's log.", "model_failed")
    return json.dumps({"class": type(error).__name__, **error.document(), "http_status": error.http_status})


def unpack_error(text: str) -> EditxError | None:
    """The exception that `pack_error` wrote somewhere into a server's message; None for a message of its own."""
    start = text.find('{"class":')
    if start < 0:
        return None
    try:
        found, _ = json.JSONDecoder().raw_decode(text[start:])
    except ValueError:
        return None
    kind = getattr(errors, found["class"], None) or getattr(port, found["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, EditxError)) or kind is errors.MissingComponent:
        kind = UserError if found["http_status"] < 500 else PermanentError
    return kind(found["message"], found["hint"], found["code"], http_status=found["http_status"])
