"""Request bodies that come as JSON or as a form with files: read once, whole files bounded, into the same models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException

from services.gateway.problems import Unprocessable
from services.gateway.schemas import nested
from shared.errors import UserError

M = TypeVar("M", bound=BaseModel)
FIELDS_MAX, FILES_MAX = 50, 2
FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


@dataclass(frozen=True)
class Body:
    """Plain values, and the files of a form by the names of their parts."""

    values: dict[str, Any]
    files: dict[str, bytes]

    def as_model(self, model: type[M], *without: str) -> M:
        """The values as a model, without the parts named in `without` that came as files. Raises Unprocessable."""
        unknown = sorted(self.files.keys() - set(without))
        if unknown:
            raise Unprocessable(f"The part {unknown[0]!r} is no file that this takes; it takes {', '.join(without)}.")
        try:
            return model.model_validate(self.values)
        except ValidationError as error:
            raise Unprocessable.from_validation(error) from error


async def read(request: Request, max_file_bytes: int) -> Body:
    """The body of a request. Raises UserError for another content type, a broken body, or a file that is too large."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind in FORMS:
        return await _form(request, max_file_bytes)
    if kind == "application/json" or kind.endswith("+json"):
        return Body(_object(await request.body()), {})
    raise UserError(f"The content type {kind or 'none'} is not understood.",
                    "Send application/json or multipart/form-data.", "unsupported_media_type",
                    http_status=415)  # fmt: skip


def _object(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"The body is no JSON: {error}.", "Send one JSON object.", "invalid_json") from error
    if not isinstance(values, dict):
        raise Unprocessable("The body must be one JSON object.")
    return values


async def _form(request: Request, max_file_bytes: int) -> Body:
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    try:
        async with request.form(max_files=FILES_MAX, max_fields=FIELDS_MAX) as form:
            for name, value in form.multi_items():
                if name in fields or name in files:
                    raise Unprocessable(f"The field {name!r} is there twice.")
                if isinstance(value, UploadFile):
                    files[name] = await _file(value, name, max_file_bytes)
                else:
                    fields[name] = value
    except (MultiPartException, UnicodeDecodeError) as error:
        raise UserError(
            f"The form cannot be read: {error}.", "Let your HTTP library write it.", "invalid_form"
        ) from error
    return Body(nested(fields), files)


async def _file(part: UploadFile, name: str, limit: int) -> bytes:
    data = await part.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{name} is larger than {limit / 2**20:.0f} MiB.",
                        "Cut it, or send it compressed (FLAC, MP3, Opus).", "audio_too_large",
                        http_status=413)  # fmt: skip
    if not data:
        raise UserError(f"{name} is empty (0 bytes).", "Send a recording with sound in it.", "audio_empty")
    return data
