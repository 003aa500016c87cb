"""/v1/batches: many edits under one id."""

from __future__ import annotations

from fastapi import APIRouter, Response

from services.gateway import batches
from services.gateway.access import Principal
from services.gateway.dependencies import Caller, GatewayOf, IdempotencyKey, PayingCaller, once
from services.gateway.gateway import Gateway
from services.gateway.problems import Unprocessable, responses
from services.gateway.schemas import BatchBody, BatchView
from services.gateway.submission import Submission, discard
from services.gateway.threads import blocking
from shared.jobs import machine
from shared.jobs.machine import JobClosed
from shared.jobs.port import JobNotFound

router = APIRouter(prefix="/v1/batches", tags=["batches"])


@router.post("", status_code=202, responses=responses(400, 401, 403, 404, 409, 413, 422, 429, 503))
async def create_batch(body: BatchBody, gateway: GatewayOf, principal: PayingCaller, key: IdempotencyKey) -> BatchView:
    """Accept many edits at once, all or none. They go to the batch lane unless they name another."""
    most = gateway.settings.batch_max
    if len(body.edits) > most:
        raise Unprocessable(f"A batch holds at most {most} edits; this one has {len(body.edits)}.")
    edits = [
        edit if "lane" in edit.model_fields_set else edit.model_copy(update={"lane": "batch"}) for edit in body.edits
    ]
    for lane in sorted({edit.lane for edit in edits}):
        await blocking(gateway.admission.jobs, principal, lane, sum(edit.lane == lane for edit in edits))
    with once(gateway, principal, key):
        received = [await blocking(gateway.recordings.receive, principal.id, edit) for edit in edits]
        submissions = [Submission(edit, recording) for edit, recording in zip(edits, received, strict=True)]
        return await blocking(batches.start, gateway, principal, submissions, key)


@router.get("/{batch_id}", responses=responses(401, 404, 503))
async def get_batch(batch_id: str, gateway: GatewayOf, principal: Caller) -> BatchView:
    """A batch and how far its jobs are."""
    return await blocking(batches.look, gateway, principal, batch_id)


@router.post("/{batch_id}/cancel", responses=responses(401, 404, 503))
async def cancel_batch(batch_id: str, gateway: GatewayOf, principal: Caller) -> BatchView:
    """Cancel every job of the batch that has not ended."""
    return await blocking(_cancel, gateway, principal, batch_id)


def _cancel(gateway: Gateway, principal: Principal, batch_id: str) -> BatchView:
    for job in batches.open_jobs(gateway, principal, batch_id):
        try:
            machine.apply(gateway.backend.jobs, job.id, machine.request_cancel)
        except (JobClosed, JobNotFound):
            continue
    return batches.look(gateway, principal, batch_id)


@router.delete("/{batch_id}", status_code=204, responses=responses(401, 404, 503))
async def delete_batch(batch_id: str, gateway: GatewayOf, principal: Caller) -> Response:
    """Delete the batch, its jobs and their artifacts; open jobs are cancelled."""
    for job in await blocking(batches.remove, gateway, principal, batch_id):
        await blocking(discard, gateway, job)
    return Response(status_code=204)
