"""The synchronous client."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from editx_client import calls
from editx_client.calls import Call, Source
from editx_client.errors import ApiError, ClientError, JobFailed, Unreachable
from editx_client.models import Batch, Event, Job, JobPage, Upload, Voice
from editx_client.retries import Retries
from editx_client.sse import Parser

OnEvent = Callable[[Event], None]


class Client:
    """Calls the gateway at `url`. Use it as a context manager, or call `close`; several threads may share it.

    Every method raises ApiError where the gateway refuses and Unreachable where it does not answer.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        retries: Retries | None = None,
        timeout_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._retries = retries or Retries()
        self._timeout_s = timeout_s
        self._http = httpx.Client(
            base_url=self.url, headers=calls.headers(api_key), timeout=timeout_s, transport=transport
        )
        self._plain = httpx.Client(timeout=timeout_s, transport=transport)  # for presigned URLs: no key goes there

    def edit(
        self,
        source: Source | None = None,
        *,
        type: str,
        on_event: OnEvent | None = None,
        timeout_s: float | None = None,
        **values: Any,
    ) -> Job:
        """Edit a recording, or clone its voice, and wait for the result; `values` are the fields of the request.

        Raises JobFailed, TimeoutError.
        """
        return self.wait(self.submit(source, type=type, **values).id, on_event, timeout_s=timeout_s)

    def submit(
        self, source: Source | None = None, *, type: str, idempotency_key: str | None = None, **values: Any
    ) -> Job:
        """Ask for an edit and come back at once. Made again after a failure it is still one job."""
        call = calls.create_edit(source, {"type": type, **values}, idempotency_key=idempotency_key)
        return Job.from_json(self._json(call))

    def submit_batch(self, edits: Sequence[Mapping[str, Any]], *, idempotency_key: str | None = None) -> Batch:
        """Ask for many edits at once; each names an `upload_id` or a `voice`."""
        return Batch.from_json(self._json(calls.create_batch(edits, idempotency_key=idempotency_key)))

    def batch(self, batch_id: str) -> Batch:
        """A batch as it stands."""
        return Batch.from_json(self._json(calls.batch(batch_id)))

    def cancel_batch(self, batch_id: str) -> Batch:
        """Ask for the end of every job of a batch that has not ended."""
        return Batch.from_json(self._json(calls.cancel_batch(batch_id)))

    def delete_batch(self, batch_id: str) -> None:
        """Delete a batch, its jobs and their audio."""
        self._send(calls.delete_batch(batch_id))

    def job(self, job_id: str, *, wait_s: float = 0.0) -> Job:
        """A job; with `wait_s` as soon as it has ended, at the latest after that time."""
        return Job.from_json(self._json(calls.job(job_id, wait_s)))

    def jobs(self, *, status: Sequence[str] = (), limit: int = 20, cursor: str | None = None) -> JobPage:
        """Your jobs, newest first."""
        return JobPage.from_json(self._json(calls.jobs(status, limit, cursor)))

    def events(self, job_id: str, *, after: int = 0) -> Iterator[Event]:
        """A job's events as they come, to its last. A connection that breaks is taken up where it was."""
        failures = 0
        while True:
            reason = "the stream ended early"
            try:
                for event in self._events(job_id, after):
                    after, failures = event.seq, 0
                    yield event
                    if event.job is not None:
                        return
                if self.job(job_id).is_ended:
                    return
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
            failures += 1
            wait_s = self._retries.wait_s(failures, None)
            if wait_s is None:
                raise Unreachable(self.url, reason)
            time.sleep(wait_s)

    def wait(self, job_id: str, on_event: OnEvent | None = None, *, timeout_s: float | None = None) -> Job:
        """The job once it is done. Raises JobFailed where it failed or was cancelled, TimeoutError."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        job: Job | None = None
        for event in self.events(job_id):
            if on_event is not None:
                on_event(event)
            job = event.job
            if job is None and until is not None and time.monotonic() > until:
                raise TimeoutError(f"The job {job_id} did not end within {timeout_s} s.")
        job = job or self.job(job_id)
        if job.status != "done":
            raise JobFailed(job)
        return job

    def cancel(self, job_id: str) -> Job:
        """Ask for a job's end."""
        return Job.from_json(self._json(calls.cancel(job_id)))

    def delete(self, job_id: str) -> None:
        """Delete a job and its audio."""
        self._send(calls.delete(job_id))

    def audio(self, job: Job | str, iteration: int | None = None) -> bytes:
        """The audio of an iteration, by default the last; 0 is the source."""
        return self._send(calls.audio(job if isinstance(job, str) else job.id, iteration)).content

    def save(self, job: Job | str, path: str | Path, iteration: int | None = None) -> Path:
        """Write the audio of an iteration to a file, in the format that the job was asked for."""
        path = Path(path)
        path.write_bytes(self.audio(job, iteration))
        return path

    def upload(self, source: Source) -> Upload:
        """Put a recording where edits, batches, voices and speech can name it."""
        data = calls.read(source)
        upload = Upload.from_json(self._json(calls.create_upload(len(data))))
        self._send(Call("PUT", upload.url, content=data), self._plain)
        return upload

    def add_voice(
        self,
        name: str,
        source: Source,
        text: str,
        *,
        consent_statement: str | None = None,
        consent_by: str | None = None,
        consent_recording: Source | None = None,
    ) -> Voice:
        """Store a voice. Consent is a recording, or a statement and who makes it."""
        call = calls.create_voice(
            name,
            source,
            text,
            consent_statement=consent_statement,
            consent_by=consent_by,
            consent_recording=consent_recording,
        )
        return Voice.from_json(self._json(call))

    def voices(self) -> list[Voice]:
        """Your voices."""
        return [Voice.from_json(one) for one in self._json(calls.voices())["data"]]

    def remove_voice(self, voice: str) -> None:
        """Delete a voice, by id or name."""
        self._send(calls.remove_voice(voice))

    def speech(self, text: str, *, model: str, voice: str | None = None, **values: Any) -> bytes:
        """A text spoken, whole. `values` are the other fields of the request, such as response_format."""
        return b"".join(self.stream_speech(text, model=model, voice=voice, **values))

    def stream_speech(self, text: str, *, model: str, voice: str | None = None, **values: Any) -> Iterator[bytes]:
        """A text spoken, in pieces as they are made. Leaving the loop stops the gateway's work."""
        reference = values.pop("reference", None)
        if reference is not None:
            values["reference_audio"] = base64.b64encode(calls.read(reference)).decode()
        call = calls.speech({"input": text, "model": model, "voice": voice, **values})
        response = self._open(call)
        try:
            yield from response.iter_bytes()
        except httpx.TransportError as error:
            raise Unreachable(self.url, f"the stream broke off: {error}") from error
        finally:
            response.close()

    def models(self) -> list[dict[str, Any]]:
        """The models that answer."""
        found: list[dict[str, Any]] = self._json(calls.models())["data"]
        return found

    def options(self) -> dict[str, Any]:
        """The types of edit and their tags."""
        return self._json(calls.options())

    def close(self) -> None:
        """Close the connections. Safe to call twice."""
        self._http.close()
        self._plain.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _events(self, job_id: str, after: int) -> Iterator[Event]:
        response, parser = self._open(calls.events(job_id, after)), Parser()
        try:
            for line in response.iter_lines():
                for name, document in parser.feed(line):
                    if name == "job.deleted":
                        raise ClientError(f"The job {job_id} was deleted.", "", "job_not_found")
                    yield Event.from_json(document)
        finally:
            response.close()

    def _json(self, call: Call) -> dict[str, Any]:
        found: dict[str, Any] = self._send(call).json()
        return found

    def _send(self, call: Call, http: httpx.Client | None = None) -> httpx.Response:
        response = self._open(call, http)
        try:
            response.read()
        finally:
            response.close()
        return response

    def _open(self, call: Call, http: httpx.Client | None = None) -> httpx.Response:
        """The answer to a call, its body still to be read; after retries. Raises ApiError, Unreachable."""
        http, attempt = http or self._http, 0
        while True:
            attempt += 1
            timeout = httpx.Timeout(self._timeout_s, read=call.read_timeout_s or self._timeout_s)
            request = http.build_request(call.method, call.path, timeout=timeout, **call.arguments())
            response: httpx.Response | None = None
            try:
                response = http.send(request, stream=True)
                if response.is_success:
                    return response
                response.read()
                failure: ClientError = ApiError.from_response(response)
            except httpx.TransportError as error:
                failure = Unreachable(self.url, str(error) or type(error).__name__)
            wait_s = self._retries.wait_s(attempt, response) if call.is_repeatable else None
            if wait_s is None:
                raise failure
            time.sleep(wait_s)
