"""POST /v1/audio/edits: one edit of one recording."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from services.gateway import bodies
from services.gateway.dependencies import GatewayOf, IdempotencyKey, PayingCaller, WaitS, once
from services.gateway.events import ended
from services.gateway.gateway import Gateway
from services.gateway.openapi import body
from services.gateway.problems import responses
from services.gateway.schemas import EDIT_EXAMPLE, EditBody, JobView
from services.gateway.submission import Submission, accept, view
from services.gateway.threads import blocking
from shared.schemas import Job

router = APIRouter(prefix="/v1/audio", tags=["edits"])


@router.post(
    "/edits",
    status_code=202,
    response_model=JobView,
    responses={200: {"model": JobView, "description": "Ended within the wait"},
               **responses(400, 401, 403, 404, 409, 413, 415, 422, 429, 503)},
    openapi_extra=body(EditBody, EDIT_EXAMPLE, "audio"),
)  # fmt: skip
async def create_edit(
    request: Request, gateway: GatewayOf, principal: PayingCaller, key: IdempotencyKey, wait_s: WaitS
) -> Response:
    """Edit a recording, or clone its voice.

    Answers 202 with the job, or 200 with the finished job where `Prefer: wait=N` was long enough. Send JSON, or a form
    with the recording as the file `audio`.
    """
    sent = await bodies.read(request, gateway.settings.max_bytes)
    edit = sent.as_model(EditBody, "audio")
    await blocking(gateway.admission.jobs, principal, edit.lane)
    with once(gateway, principal, key):
        recording = await blocking(gateway.recordings.receive, principal.id, edit, sent.files.get("audio"))
        created = await blocking(accept, gateway, principal, Submission(edit, recording), key)
    job, headers = created.job, {} if created.is_new else {"idempotency-replayed": "true"}
    wait_s = min(wait_s, gateway.settings.wait_max_s)
    if wait_s and not job.is_terminal:
        job = await ended(gateway, job, wait_s)
        headers["preference-applied"] = f"wait={int(wait_s)}"
    return await answered(gateway, job, headers)


async def answered(gateway: Gateway, job: Job, headers: dict[str, str]) -> Response:
    """A job as an answer: 200 once it has ended, else 202."""
    document = (await blocking(view, gateway, job)).model_dump(mode="json")
    headers["location"] = f"/v1/jobs/{job.id}"
    return JSONResponse(document, 200 if job.is_terminal else 202, headers)
