"""POST /v1/uploads: a place to put a recording before it is edited."""

from __future__ import annotations

from fastapi import APIRouter

from services.gateway.dependencies import GatewayOf, PayingCaller
from services.gateway.problems import responses
from services.gateway.schemas import Upload, UploadBody
from services.gateway.threads import blocking

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])


@router.post("", status_code=201, responses=responses(401, 413, 422, 429, 503))
async def create_upload(gateway: GatewayOf, principal: PayingCaller, body: UploadBody | None = None) -> Upload:
    """A presigned URL to PUT a recording to. The upload's id then names it in edits, batches, voices and speech."""
    size, now = body.bytes if body else None, gateway.backend.jobs.now()
    return await blocking(gateway.recordings.upload, principal.id, size, now)
