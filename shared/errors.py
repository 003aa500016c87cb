"""The errors of the whole system and what each means to a person, a command line, an HTTP client and a worker.

Knows nothing about who raises them. A message says what is wrong and where, a hint says what to do about it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, TypedDict

if TYPE_CHECKING:
    from pydantic import ValidationError


class ErrorDocument(TypedDict):
    """The form in which an error travels: in job events, in HTTP bodies and in dead letters."""

    code: str
    message: str
    hint: str


class EditxError(Exception):
    """Base of every error raised on purpose.

    Attributes: `message` (what and where), `hint` (what to do), `code` (stable, machine readable), `exit_code` (of the
    command line), `http_status`, `retryable` (whether the same step may succeed when it is simply run again).
    """

    default_code: ClassVar[str] = "internal_error"
    default_http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, hint: str = "", code: str = "", *, http_status: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code or self.default_code
        self.http_status = self.default_http_status if http_status is None else http_status

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (type(self), self.message, self.hint, self.code, self.http_status, self.__dict__)

    def document(self) -> ErrorDocument:
        """The error as plain data."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


class UserError(EditxError):
    """The caller asked for something that cannot be done as asked; asking again unchanged fails again."""

    default_code = "invalid_request"
    default_http_status = 400
    exit_code = 2


class MissingComponent(UserError):
    """A checkpoint lacks a file, or an optional package is not installed."""

    default_code = "missing_component"
    default_http_status = 503
    exit_code = 3

    def __init__(self, component: str, where: str, hint: str = "", code: str = "") -> None:
        super().__init__(f"{component} is missing: {where}.", hint or "Check the checkpoint with `editx doctor`.", code)
        self.component = component
        self.where = where


class TransientError(EditxError):
    """Something outside failed for now (a broker, a store, a model server): a worker tries the step again."""

    default_code = "temporarily_unavailable"
    default_http_status = 503
    exit_code = 4
    retryable = True


class PermanentError(EditxError):
    """The step failed and would fail again: a worker ends the job as failed without another attempt."""

    default_code = "step_failed"


class PoisonError(PermanentError):
    """The message or artifact itself cannot be understood: a worker moves it to the dead letters with this reason."""

    default_code = "unreadable_message"
    default_http_status = 422


def reasons(error: ValidationError) -> str:
    """What is wrong with which field of data that pydantic refused, in one line."""
    found = ((".".join(map(str, one["loc"])), one["msg"]) for one in error.errors())
    return "; ".join(f"{field}: {reason}" if field else reason for field, reason in found)


def _restore(kind: type[EditxError], message: str, hint: str, code: str, http_status: int, state: dict[str, object]
             ) -> EditxError:  # fmt: skip
    error = kind.__new__(kind)
    EditxError.__init__(error, message, hint, code, http_status=http_status)
    error.__dict__.update(state)
    return error
