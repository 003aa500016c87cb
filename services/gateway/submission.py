"""From a checked request to an accepted job, and from a job to what its owner sees. Every function here may block."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from services.gateway.access import Principal
from services.gateway.gateway import Gateway
from services.gateway.problems import NotFound, Unprocessable
from services.gateway.recordings import Received
from services.gateway.schemas import AudioResult, EditBody, JobProblem, JobView, StepReport, job_request
from shared import telemetry
from shared.bus.port import BusUnavailable
from shared.checkpoints.layout import Metadata
from shared.errors import UserError
from shared.jobs import machine
from shared.jobs.port import Created, Idempotency, JobNotFound, TooManyOpen
from shared.publishing import publish_step
from shared.schemas import Job, JobRequest, JobState, new_job_id
from shared.schemas.request import SEED_MAX
from shared.schemas.route import job_prefix, source_key
from shared.store.port import ArtifactInfo, ArtifactNotFound
from shared.tags import check_tag, check_text_tags
from shared.tallies import looked_up

log = logging.getLogger(__name__)
_KEY = re.compile(r'"?([A-Za-z0-9._:/+=-]{1,128})"?')
PURGES_MAX = 10


@dataclass(frozen=True)
class Submission:
    """One edit as it was asked for, with its recording."""

    body: EditBody
    recording: Received

    @property
    def fingerprint(self) -> str:
        """What makes two requests the same: all their values, and the recording itself."""
        asked = self.body.model_dump(mode="json", exclude={"audio"}) | {"recording": self.recording.sha256}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def request(self, metadata: Metadata) -> JobRequest:
        """The job's request, its tags in published spelling.

        Raises UserError for a tag or language that the checkpoint cannot do, Unprocessable for what does not fit.
        """
        body = self.body
        metadata.check_languages(body.text or self.recording.text, body.target_text)
        changes: dict[str, Any] = {}
        if body.detail is not None and body.type in ("emotion", "style", "speed"):
            changes["detail"] = check_tag(body.type, body.detail)
        if body.target_text is not None:
            changes["target_text"] = check_text_tags(body.target_text)
        seed = random.randrange(SEED_MAX) if body.seed is None else body.seed
        try:
            return job_request(body.model_copy(update=changes), body.text or self.recording.text, seed)
        except ValidationError as error:
            raise Unprocessable.from_validation(error) from error


def idempotency_key(header: str | None) -> str | None:
    """The key in an Idempotency-Key header, quoted or not. Raises UserError."""
    if header is None:
        return None
    match = _KEY.fullmatch(header.strip())
    if match is None:
        raise UserError("Idempotency-Key must be 1 to 128 letters, digits or ._:/+=-.", "A UUID is a good one.",
                        "bad_idempotency_key")  # fmt: skip
    return match[1]


def accept(gateway: Gateway, principal: Principal, submission: Submission, key: str | None) -> Created:
    """Store a job and its recording, then publish it; an earlier job comes back for a known idempotency key.

    What cannot be published now the sweeper publishes later.

    Raises UserError, IdempotencyConflict, TooMuch, TransientError.
    """
    backend, request = gateway.backend, submission.request(gateway.backend.metadata)
    backend.metadata.check_candidates(request.n_best, has_reward=backend.has_reward)
    if request.webhook_url is not None:
        gateway.webhooks.check(request.webhook_url, principal.webhook_secret)
    move = machine.accept(
        request,
        backend.jobs.now(),
        job_id=new_job_id(),
        owner=principal.id,
        trace=telemetry.inject(),
        keep_s=gateway.settings.job_keep_s,
    )
    job, idempotency = move.job, None if key is None else Idempotency(key, submission.fingerprint)
    backend.store.put(source_key(job.id), submission.recording.data)
    if request.webhook_url is not None:
        gateway.webhooks.remember(job.id)
    try:
        created = backend.jobs.create(job, move.events, idempotency=idempotency, open_max=principal.open_jobs_max)
    except UserError as error:
        _forget(gateway, job.id)
        if isinstance(error, TooManyOpen):
            raise gateway.admission.too_many(error.message) from error
        raise  # after any other error the job may be stored, so what belongs to it stays
    if key is not None:
        looked_up("jobs", hits=not created.is_new, misses=created.is_new)
    if not created.is_new:
        _forget(gateway, job.id)
        return created
    if request.webhook_url is not None:
        gateway.webhooks.watch(job.id)
    edit = request.edit.type if request.edit else "none"
    gateway.metrics.accepted.labels(request.lane, edit).inc()
    with telemetry.log_fields(job_id=job.id):
        try:
            published = publish_step(backend.bus, backend.jobs, created.job)
        except BusUnavailable as error:
            log.warning("accepted and not published yet: %s", error)
            return created
        log.info("accepted %s in the %s lane", edit, request.lane)
    return Created(published, is_new=True)


def _forget(gateway: Gateway, job_id: str) -> None:
    """Take back what was stored for a job that did not come to be."""
    gateway.backend.store.delete_prefix(job_prefix(job_id))
    gateway.webhooks.forget(job_id)


def own_job(gateway: Gateway, principal: Principal, job_id: str) -> Job:
    """A job of the principal. Raises NotFound, also for one that is being deleted."""
    try:
        job = gateway.backend.jobs.get(job_id)
    except (JobNotFound, UserError) as error:
        raise NotFound(f"There is no job {job_id}.", "", "job_not_found") from error
    if job.owner != principal.id or job.request.edit is None or is_gone(job, gateway.backend.jobs.now()):
        raise NotFound(f"There is no job {job_id}.", "", "job_not_found")
    return job


def is_gone(job: Job, now: float) -> bool:
    """Whether a job was deleted or has expired, though its record may still be there."""
    return job.discarded or (job.expires_at is not None and job.expires_at <= now)


def discard(gateway: Gateway, job: Job) -> None:
    """Delete a job and its artifacts; an open one is cancelled, and deleted once its worker has let go."""
    jobs, store = gateway.backend.jobs, gateway.backend.store
    job = machine.apply(jobs, job.id, machine.discard)
    if not job.is_terminal:
        return
    store.delete_prefix(job_prefix(job.id))
    for _ in range(PURGES_MAX):
        purged = jobs.purge(jobs.now())
        for gone in purged:
            store.delete_prefix(job_prefix(gone))
        if not purged or job.id in purged:
            return


def audio_key(job: Job, iteration: int) -> tuple[str, str]:
    """Key and format of an iteration's audio, 0 being the source. Raises NotFound for one that is not ready."""
    if iteration == 0:
        return job.request.source_key or source_key(job.id), "source"
    ready = _ready(job)
    if not 1 <= iteration <= len(ready):
        raise NotFound(
            f"Iteration {iteration} of the job {job.id} is not there; {len(ready)} are ready.",
            "0 is the source.", "audio_not_ready",
        )  # fmt: skip
    form = job.request.format if iteration == job.request.iterations else "wav"
    return ready[iteration - 1].removesuffix("wav") + form, form


def audio_of(gateway: Gateway, job: Job, iteration: int) -> tuple[bytes, ArtifactInfo]:
    """An iteration's audio. Raises NotFound."""
    key, _ = audio_key(job, iteration)
    try:
        return gateway.backend.store.get(key), gateway.backend.store.stat(key)
    except ArtifactNotFound as error:
        raise NotFound(f"The audio of the job {job.id} is gone.", "It may have expired.", "audio_gone") from error


def view(gateway: Gateway, job: Job) -> JobView:
    """A job as its owner sees it."""
    request, now = job.request, gateway.backend.jobs.now()
    trace = job.trace.get("traceparent", "").split("-")
    return JobView(
        id=job.id,
        status=job.state.value,
        stage=None if job.is_terminal else job.step.kind,
        progress=round(job.progress, 4),
        note=job.note,
        edit=request.edit,
        text=request.text,
        iterations=request.iterations,
        n_best=request.n_best,
        seed=request.seed,
        format=request.format,
        lane=request.lane,
        cancel_requested=job.cancel_requested,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        expires_at=job.expires_at,
        audio=[_audio(gateway, job, number + 1, now) for number in range(len(_ready(job)))],
        steps=[
            StepReport(
                index=timing.index,
                kind=timing.kind,
                seconds=round(timing.finished_at - timing.started_at, 4),
                attempts=timing.attempts,
                metrics=timing.metrics,
            )
            for timing in job.timings
        ],
        error=None if job.error is None else JobProblem.model_validate(job.error.model_dump(exclude={"dead_letter"})),
        warnings=gateway.backend.metadata.warnings(request.edit),
        trace_id=trace[1] if len(trace) == 4 else None,
    )


def _ready(job: Job) -> Sequence[str]:
    """Keys of the iterations whose decode step is done."""
    done = sum(step.kind == "decode" for step in job.route.steps[: job.step_index])
    return job.result_keys[: done if job.state != JobState.DONE else None]


def _audio(gateway: Gateway, job: Job, iteration: int, now: float) -> AudioResult:
    key, form = audio_key(job, iteration)
    expires_s = gateway.settings.url_expires_s
    return AudioResult(
        iteration=iteration,
        format=form,
        href=f"/v1/jobs/{job.id}/audio?iteration={iteration}",
        url=gateway.backend.store.presign_get(key, expires_s=expires_s),
        url_expires_at=now + expires_s,
    )
