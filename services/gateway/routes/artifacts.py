"""/v1/artifacts: what presigned URLs of the folder store point at. Other stores serve their own.

A key is used only with a signature that this gateway made for it.
"""

from __future__ import annotations

import tempfile
from typing import Annotated, BinaryIO, Literal, cast

from fastapi import APIRouter, Query, Request, Response

from services.gateway.backend import ARTIFACTS_PATH
from services.gateway.dependencies import GatewayOf
from services.gateway.gateway import Gateway
from services.gateway.problems import NotFound
from services.gateway.threads import blocking
from shared.errors import UserError
from shared.store.folder import FolderStore

router = APIRouter(prefix=ARTIFACTS_PATH, include_in_schema=False)
IN_MEMORY_BYTES = 1 << 20
Signature = Annotated[str, Query(max_length=128)]
Expires = Annotated[str, Query(max_length=16)]


def _signed(gateway: Gateway, method: Literal["GET", "PUT"], key: str, expires: str, signature: str) -> FolderStore:
    store = gateway.backend.store
    if not isinstance(store, FolderStore):
        raise NotFound("Artifacts are not served here.")
    store.check_signature(method, key, expires, signature)
    return store


@router.get("/{key:path}")
async def get_artifact(key: str, gateway: GatewayOf, expires: Expires = "", signature: Signature = "") -> Response:
    """The object of a presigned URL."""
    store = _signed(gateway, "GET", key, expires, signature)
    data, info = await blocking(store.get, key), await blocking(store.stat, key)
    headers = {"x-content-type-options": "nosniff", "content-disposition": "attachment"}
    return Response(data, 200, headers, info.content_type)


@router.put("/{key:path}")
async def put_artifact(
    request: Request, key: str, gateway: GatewayOf, expires: Expires = "", signature: Signature = ""
) -> Response:
    """Take the object of a presigned URL, up to the largest recording."""
    store, limit, size = _signed(gateway, "PUT", key, expires, signature), gateway.settings.max_bytes, 0
    with tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES) as file:
        async for block in request.stream():
            size += len(block)
            if size > limit:
                raise UserError(f"The upload is larger than the {limit} bytes allowed.",
                                "Cut the recording, or send it compressed.", "audio_too_large",
                                http_status=413)  # fmt: skip
            file.write(block)
        file.seek(0)
        await blocking(store.put, key, cast(BinaryIO, file))
    return Response(status_code=200)
