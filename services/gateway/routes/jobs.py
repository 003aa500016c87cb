"""/v1/jobs: look, follow, listen, cancel, delete."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from services.gateway import events, ranges
from services.gateway.dependencies import Caller, GatewayOf, WaitS
from services.gateway.problems import responses
from services.gateway.schemas import JobList, JobView
from services.gateway.submission import audio_of, discard, is_gone, own_job, view
from services.gateway.threads import blocking
from shared.errors import UserError
from shared.jobs import machine
from shared.schemas import JobState

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
AUDIO_TYPES = {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg", "opus": "audio/ogg"}
_AUDIO = {"content": {kind: {"schema": {"type": "string", "format": "binary"}}
                      for kind in (*AUDIO_TYPES.values(), "application/octet-stream")}}  # fmt: skip
AUDIO_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: _AUDIO,
    206: {"description": "The part that `Range` asks for", **_AUDIO},
    304: {"description": "`If-None-Match` names this audio"},
    416: {"description": "`Range` lies behind the end"},
    **responses(401, 404, 422, 503),
}


@router.get("", responses=responses(401, 422, 503))
async def list_jobs(
    gateway: GatewayOf,
    principal: Caller,
    status: Annotated[list[JobState] | None, Query(description="Only these; may be repeated.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Annotated[str | None, Query(max_length=128, description="`next_cursor` of the page before.")] = None,
) -> JobList:
    """Your jobs, newest first."""
    jobs = gateway.backend.jobs
    page = await blocking(jobs.list, owner=principal.id, states=tuple(status or ()), limit=limit, cursor=cursor)
    now = jobs.now()
    shown = [job for job in page.jobs if job.request.edit is not None and not is_gone(job, now)]
    return JobList(data=[await blocking(view, gateway, job) for job in shown], next_cursor=page.cursor)


@router.get("/{job_id}", responses=responses(401, 404, 503))
async def get_job(job_id: str, gateway: GatewayOf, principal: Caller, wait_s: WaitS) -> JobView:
    """A job; with `Prefer: wait=N` as soon as it has ended, at the latest after N seconds."""
    job = await blocking(own_job, gateway, principal, job_id)
    if wait_s and not job.is_terminal:
        job = await events.ended(gateway, job, min(wait_s, gateway.settings.wait_max_s))
    return await blocking(view, gateway, job)


@router.get(
    "/{job_id}/events",
    response_class=StreamingResponse,
    responses={
        200: {"content": {events.CONTENT_TYPE: {"schema": {"type": "string"}}}},
        204: {"description": "The job has ended, and no event is left"},
        **responses(400, 401, 404, 429),
    },
)
async def follow_job(
    job_id: str,
    gateway: GatewayOf,
    principal: Caller,
    last_event_id: Annotated[
        str | None, Header(description="Number of the last event seen; only later ones come.")
    ] = None,
    after: Annotated[int, Query(ge=0, le=2**53, description="The same, for clients that cannot set headers.")] = 0,
) -> Response:
    """The job's events as server-sent events, to its end. The last one carries the job.

    Whoever has seen it gets 204, which tells a browser's EventSource not to come again.
    """
    if last_event_id is not None:
        if not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) < 16):
            raise UserError(
                "Last-Event-ID must be the number of an event.", "Leave it out to see them all.", "bad_event_id"
            )
        after = int(last_event_id)
    job = await blocking(own_job, gateway, principal, job_id)
    gateway.listeners.check()
    if job.is_terminal and not await blocking(partial(gateway.backend.jobs.events, job.id, after=after, limit=1)):
        return Response(status_code=204)
    return StreamingResponse(events.job_events(gateway, job, after), 200, events.HEADERS, events.CONTENT_TYPE)


@router.head("/{job_id}/audio", response_class=Response, responses=AUDIO_RESPONSES, operation_id="head_audio")
@router.get("/{job_id}/audio", response_class=Response, responses=AUDIO_RESPONSES)
async def get_audio(
    request: Request,
    job_id: str,
    gateway: GatewayOf,
    principal: Caller,
    iteration: Annotated[
        int | None, Query(ge=0, le=10, description="0 is the source; the default is the last.")
    ] = None,
) -> Response:
    """The audio of an iteration, or the source; with `Range` a part of it, with `If-None-Match` only what is new."""
    job = await blocking(own_job, gateway, principal, job_id)
    number = job.request.iterations if iteration is None else iteration
    data, info = await blocking(audio_of, gateway, job, number)
    form = "source" if number == 0 else job.request.format if number == job.request.iterations else "wav"
    headers = {"etag": f'"{info.sha256}"'} if info.sha256 else {}
    headers["x-content-type-options"] = "nosniff"
    if number:
        headers["content-disposition"] = f'attachment; filename="{job.id}-{number}.{form}"'
    return ranges.answer(data, AUDIO_TYPES.get(form, "application/octet-stream"), headers, request.headers)


@router.post("/{job_id}/cancel", responses=responses(401, 404, 409, 503))
async def cancel_job(job_id: str, gateway: GatewayOf, principal: Caller) -> JobView:
    """Cancel a job: at once, or as soon as its worker has let go. A job that has ended answers 409."""
    job = await blocking(own_job, gateway, principal, job_id)
    job = await blocking(machine.apply, gateway.backend.jobs, job.id, machine.request_cancel)
    return await blocking(view, gateway, job)


@router.delete("/{job_id}", status_code=204, responses=responses(401, 404, 503))
async def delete_job(job_id: str, gateway: GatewayOf, principal: Caller) -> Response:
    """Delete a job and all its artifacts. An open job is cancelled first."""
    job = await blocking(own_job, gateway, principal, job_id)
    await blocking(discard, gateway, job)
    return Response(status_code=204)
