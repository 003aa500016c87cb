"""What systems of others exchange with editx over the bus: a submission goes in, a result comes out.

Versioned and documented as JSON schema in docs/messages; the steps in between are not part of it.
"""

from __future__ import annotations

import json
from typing import Any, Literal, Self

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.errors import PoisonError
from shared.recordings import UPLOAD_ID
from shared.schemas.job import Job, JobError, JobState, StepTiming
from shared.schemas.request import JobRequest

SUBMISSIONS = "editx.submissions"
RESULTS = "editx.results"
AUDIO_BYTES_MAX = 700_000

SUBMISSION_ID = r"^[A-Za-z0-9._:-]+$"
ResultState = Literal["accepted", "done", "failed", "cancelled", "rejected"]


ENDS: dict[JobState, ResultState] = {
    JobState.DONE: "done", JobState.FAILED: "failed", JobState.CANCELLED: "cancelled",
}  # fmt: skip


class SubmittedRequest(JobRequest):
    """What is to be done. `text` may be left out with a stored voice, which knows what its recording says."""

    @model_validator(mode="after")
    def _knows_what_is_said(self) -> Self:
        return self  # the submission sees whether a voice does


class Submission(BaseModel):
    """One edit that is asked for over the bus, on the topic editx.submissions.

    The same `submission_id` makes one job, however often it is sent. The recording is given once: as `audio`, at most
    700,000 bytes; as `upload_id` or `voice` of the same owner; or as an object of the artifact store, named by
    `request.source_key`, for systems that write there themselves.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra={
        "examples": [{
            "schema_version": 1, "submission_id": "order-4711",
            "request": {"edit": {"type": "emotion", "detail": "happy"}, "text": "Hello."},
            "upload_id": "upl_00112233445566778899aabbccddeeff",
        }],
    })  # fmt: skip

    schema_version: Literal[1] = 1
    submission_id: str = Field(min_length=1, max_length=128, pattern=SUBMISSION_ID)
    owner: str = Field(default="local", min_length=1, max_length=128, description="Who may see the job.")
    request: SubmittedRequest
    audio: Base64Bytes | None = Field(default=None, description="The recording itself, as base64.")
    upload_id: str | None = Field(default=None, pattern=UPLOAD_ID, description="Of a finished POST /v1/uploads.")
    voice: str | None = Field(default=None, min_length=1, max_length=64, description="A stored voice: its id or name.")

    @model_validator(mode="after")
    def _one_recording(self) -> Self:
        named = (self.audio, self.upload_id, self.voice, self.request.source_key)
        if self.request.edit is not None and sum(one is not None for one in named) != 1:
            raise ValueError("a submission holds its recording once: audio, upload_id, voice or request.source_key")
        if self.request.lacks_text and self.voice is None:
            raise ValueError("request.text is needed: what the recording says")
        if self.audio is not None and len(self.audio) > AUDIO_BYTES_MAX:
            raise ValueError(f"audio holds {len(self.audio)} bytes, at most {AUDIO_BYTES_MAX} fit into a message")
        return self

    @classmethod
    def from_record(cls, value: bytes) -> Submission:
        """The submission in a record. Raises PoisonError when it is none of a known version."""
        try:
            return cls.model_validate_json(value)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors()[:3])
            raise PoisonError(f"Not a submission of a known version: {problems}.",
                              "See docs/messages/submission.json.") from error  # fmt: skip


def sender_of(value: bytes) -> tuple[str, str] | None:
    """The submission_id and owner in a record that is no valid submission, if they can be read."""
    try:
        found: Any = json.loads(value)
        sender = _Sender.model_validate(found)
    except (ValueError, RecursionError):
        return None
    return sender.submission_id, sender.owner


class _Sender(BaseModel):
    """Whom to tell that a submission is none."""

    submission_id: str = Field(min_length=1, max_length=128, pattern=SUBMISSION_ID)
    owner: str = Field(default="local", min_length=1, max_length=128)


class Result(BaseModel):
    """How a job ended, on the topic editx.results; the key is the job's id. It may come more than once.

    A submission is answered by `accepted` first, which names its job, or by `rejected`, which has no `job_id`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    job_id: str = ""
    submission_id: str = Field(default="", description="Of the submission that asked for the job; empty for others.")
    owner: str = "local"
    state: ResultState
    result_keys: tuple[str, ...] = Field(
        default=(), description="Artifact keys of the audio of every iteration, first to last; empty unless done."
    )
    error: JobError | None = None
    created_at: float = Field(default=0.0, description="Unix seconds.")
    finished_at: float = Field(default=0.0, description="Unix seconds.")
    timings: tuple[StepTiming, ...] = ()

    @classmethod
    def of(cls, job: Job) -> Result:
        """The result of a job that has ended, or that it was accepted."""
        state = ENDS.get(job.state, "accepted")
        return cls(
            job_id=job.id,
            submission_id=job.reference,
            owner=job.owner,
            state=state,
            result_keys=tuple(job.result_keys) if state == "done" else (),
            error=job.error if state == "failed" else None,
            created_at=job.created_at,
            finished_at=job.finished_at or 0.0,
            timings=job.timings,
        )
