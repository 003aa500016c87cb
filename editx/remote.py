"""Runs at a gateway instead of in this process: what `editx --url` uses where `editx.api.Editor` works here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from editx.api import JobCancelled, JobFailed, Result, Source, read_source, told_by
from editx_client import ApiError, Client, ClientError, Event, Unreachable
from editx_client import Job as RemoteJob
from editx_client import JobFailed as RemoteFailed
from shared.audio.io import Waveform, read_audio, write_audio
from shared.errors import EditxError, TransientError, UserError
from shared.schemas import Job, JobEvent, JobRequest, JobState, StepTiming, build_route


class RemoteEditor:
    """Edits and clones at the gateway `url`. Several threads may share it."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._client = Client(url, api_key=api_key)
        self._open: set[str] = set()
        self._lock = threading.Lock()

    def run(self, source: Source, request: JobRequest, on_event: Callable[[JobEvent], None] | None = None) -> Result:
        """Carry out a request there and wait for it; an interrupt (Ctrl-C) cancels it first.

        Raises as the editor of this process does, and TransientError where the gateway does not answer.
        """
        recording = read_source(source)
        began = time.perf_counter()
        try:
            job = self._run(recording, request, on_event)
            audio = tuple(self._audio(job, number + 1) for number in range(request.iterations))
        except ClientError as error:
            raise translated(error) from error
        seconds = time.perf_counter() - began
        local = _local(job, request)
        return Result(audio, recording, local, job.seed, seconds, (*job.warnings, *told_by(local)))

    def cancel_all(self) -> None:
        """Cancel every run that has not ended."""
        with self._lock:
            waiting = list(self._open)
        for job_id in waiting:
            with suppress(ClientError):
                self._client.cancel(job_id)

    def close(self) -> None:
        """Close the connections. Safe to call twice."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, recording: Waveform, request: JobRequest, on_event: Callable[[JobEvent], None] | None) -> RemoteJob:
        def tell(event: Event) -> None:
            if on_event is not None:
                on_event(JobEvent.model_validate({**asdict(event), "job": None} | {"data": event.data}, extra="ignore"))

        job = self._client.submit(write_audio(recording, None, "wav") or b"", **fields(request))
        with self._lock:
            self._open.add(job.id)
        try:
            return self._client.wait(job.id, tell)
        except BaseException as error:
            if not isinstance(error, RemoteFailed):
                with suppress(ClientError):
                    self._client.cancel(job.id)
            raise
        finally:
            with self._lock:
                self._open.discard(job.id)

    def _audio(self, job: RemoteJob, iteration: int) -> Waveform:
        return read_audio(self._client.audio(job, iteration))


def fields(request: JobRequest) -> dict[str, Any]:
    """A request as the gateway's fields."""
    assert request.edit is not None
    found = request.model_dump(exclude={"edit", "training", "source_key", "webhook_url"}, exclude_none=True)
    return {**request.edit.model_dump(exclude_none=True), **found}


def translated(error: ClientError) -> EditxError:
    """A client's error as the command line knows it: its kind decides the exit code."""
    if isinstance(error, RemoteFailed):
        if error.job.status == "cancelled":
            return JobCancelled(error.message, error.hint)
        return JobFailed(error.message, error.hint, error.code)
    if isinstance(error, Unreachable) or (isinstance(error, ApiError) and (error.status >= 500 or error.status == 429)):
        return TransientError(error.message, error.hint, error.code)
    return UserError(error.message, error.hint, error.code)


def _local(job: RemoteJob, request: JobRequest) -> Job:
    """The remote job as a record of this process's kind, for reports."""
    timings = tuple(
        StepTiming(
            index=step.index,
            kind=step.kind,
            started_at=0.0,
            finished_at=step.seconds,
            attempts=step.attempts,
            metrics=step.metrics,
        )
        for step in job.steps
    )
    return Job(
        id=job.id,
        state=JobState(job.status),
        request=request,
        route=build_route(job.id, request),
        created_at=job.created_at,
        updated_at=job.finished_at or job.created_at,
        timings=timings,
    )
