"""What can go wrong, as the caller sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from editx_client.models import Job


class ClientError(Exception):
    """Base of all errors of this package. `message` says what, `hint` what to do about it."""

    def __init__(self, message: str, hint: str = "", code: str = "client_error") -> None:
        super().__init__(f"{message} {hint}".rstrip())
        self.message = message
        self.hint = hint
        self.code = code


class Unreachable(ClientError):
    """The gateway did not answer, after all retries."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url} does not answer ({reason}).", "Check the address and that it runs.", "unreachable")


class ApiError(ClientError):
    """The gateway refused a call: its problem document."""

    def __init__(self, status: int, document: dict[str, Any], retry_after_s: float | None = None) -> None:
        super().__init__(
            str(document.get("detail") or document.get("title") or f"The gateway answered {status}."),
            str(document.get("hint") or ""),
            str(document.get("code") or "http_error"),
        )
        self.status = status
        self.request_id = str(document.get("request_id") or "")
        self.errors: list[dict[str, str]] = list(document.get("errors") or [])
        self.retry_after_s = retry_after_s

    @classmethod
    def from_response(cls, response: httpx.Response) -> ApiError:
        """The problem in an answer whose body has been read."""
        try:
            document = response.json()
        except ValueError:
            document = {}
        return cls(response.status_code, document if isinstance(document, dict) else {}, retry_after(response))


class JobFailed(ClientError):
    """The job ended without a result; `job` has the reason."""

    def __init__(self, job: Job) -> None:
        reason = job.error.message if job.error else f"It is {job.status}."
        code = job.error.code if job.error else job.status
        super().__init__(f"The job {job.id} did not succeed: {reason}", job.error.hint if job.error else "", code)
        self.job = job


def retry_after(response: httpx.Response) -> float | None:
    """Seconds in a Retry-After header, if it holds seconds."""
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdigit() else None
