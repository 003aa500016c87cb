"""Errors as HTTP answers: problem documents after RFC 9457. Knows every error's status and code, not who raised it."""

from __future__ import annotations

import logging
import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException

from services.gateway.observe import request_id
from shared.errors import EditxError, TransientError, UserError

log = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"
REF = "#/components/schemas/Problem"
RETRY_AFTER_S = 2.0


class TooMuch(UserError):
    """The caller's quota, or what the system can take for now, is used up; `retry_after_s` says when to come again."""

    default_code = "too_many_requests"
    default_http_status = 429

    def __init__(self, message: str, hint: str = "", code: str = "", *, retry_after_s: float) -> None:
        super().__init__(message, hint, code)
        self.retry_after_s = retry_after_s


class Unauthorized(UserError):
    """The call carries no key, or one that nobody has."""

    default_code = "unauthorized"
    default_http_status = 401


class Forbidden(UserError):
    """The key is known and may not do this."""

    default_code = "forbidden"
    default_http_status = 403


class Conflict(UserError):
    """The state of things does not allow this now."""

    default_code = "conflict"
    default_http_status = 409


class NotFound(UserError):
    """There is nothing of this name, or it is somebody else's."""

    default_code = "not_found"
    default_http_status = 404


class Unprocessable(UserError):
    """The request is understood and its values do not fit together; `errors` names the fields."""

    default_code = "invalid_request"
    default_http_status = 422

    def __init__(self, message: str, errors: list[dict[str, str]] | None = None) -> None:
        super().__init__(message, "Compare it with /docs.")
        self.errors = errors or []

    @classmethod
    def from_validation(cls, error: ValidationError) -> Unprocessable:
        """The problem in a pydantic error, field by field."""
        fields = [_field(one) for one in error.errors(include_url=False, include_context=False, include_input=False)]
        return cls("; ".join(f"{one['field']}: {one['message']}" for one in fields[:5]), fields)


class Problem(BaseModel):
    """What is wrong, in the form of RFC 9457."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(examples=["urn:editx:problem:audio_silent"])
    title: str = Field(examples=["Bad Request"])
    status: int = Field(examples=[400])
    detail: str = Field(examples=["audio is silent for all its 2.00 s."])
    code: str = Field(description="Stable and machine readable.", examples=["audio_silent"])
    hint: str = Field(default="", description="What to do about it.")
    instance: str = Field(description="The path that was called.", examples=["/v1/audio/edits"])
    request_id: str
    errors: list[dict[str, str]] = Field(default_factory=list, description="The fields that are wrong, if any.")


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route that may answer with problems."""
    return {
        status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: {"schema": {"$ref": REF}}}}
        for status in statuses
    }


def problem(
    request: Request,
    status: int,
    code: str,
    detail: str,
    hint: str = "",
    errors: list[dict[str, str]] | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """One problem as an answer."""
    document = Problem(
        type=f"urn:editx:problem:{code}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code,
        hint=hint,
        instance=request.url.path,
        request_id=request_id(),
        errors=errors or [],
    )
    return JSONResponse(jsonable_encoder(document), status, headers, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Have the application answer every error with a problem document."""
    app.add_exception_handler(EditxError, _editx)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)


async def _editx(request: Request, error: Exception) -> Response:
    assert isinstance(error, EditxError)
    status, headers = error.http_status, dict[str, str]()
    if status == 499:  # not a registered status: the call was given up
        status = 409
    retry_after_s = getattr(error, "retry_after_s", RETRY_AFTER_S if isinstance(error, TransientError) else None)
    if retry_after_s is not None:
        headers["retry-after"] = str(max(math.ceil(retry_after_s), 1))
    if status == 401:
        headers["www-authenticate"] = 'Bearer realm="editx"'
    if status >= 500:
        log.warning("answered %d: %s", status, error)
    return problem(request, status, error.code, error.message, error.hint, getattr(error, "errors", None), headers)


async def _validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    fields = [_field(one) for one in error.errors()]
    detail = "; ".join(f"{one['field']}: {one['message']}" for one in fields[:5])
    return problem(request, 422, "invalid_request", detail, "Compare it with /docs.", fields)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = HTTPStatus(error.status_code).name.lower()
    return problem(request, error.status_code, code, str(error.detail), headers=dict(error.headers or {}))


async def unforeseen(request: Request, error: Exception) -> Response:
    """The answer to an exception that nobody foresaw: it tells nothing of the inside, the log tells all."""
    log.error("unforeseen error at %s %s", request.method, request.url.path, exc_info=error)
    return problem(request, 500, "internal_error", "The gateway met an error that it did not foresee.",
                   "This is a defect; its log has the details under the request id.")  # fmt: skip


def _field(one: Any) -> dict[str, str]:
    where = [str(part) for part in one["loc"] if part not in ("body", "query", "path", "header")]
    return {"field": ".".join(where) or "body", "message": str(one["msg"])}
