"""What systems of others exchange with editx over the bus: a submission goes in, a result comes out.

Versioned and documented as JSON schema in docs/messages; the steps in between are not part of it.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.errors import PoisonError
from shared.schemas.job import Job, JobError, StepTiming
from shared.schemas.request import JobRequest

SUBMISSIONS = "editx.submissions"
RESULTS = "editx.results"
AUDIO_BYTES_MAX = 700_000

SubmissionState = Literal["done", "failed", "cancelled", "rejected"]


class Submission(BaseModel):
    """One edit that is asked for over the bus, on the topic editx.submissions.

    The same `submission_id` makes one job, however often it is sent. The recording is either `audio`, at most 700,000
    bytes, or an object that lies in the artifact store already, named by `request.source_key`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra={
        "examples": [{
            "schema_version": 1, "submission_id": "order-4711",
            "request": {"edit": {"type": "emotion", "detail": "happy"}, "text": "Hello.", "source_key": "uploads/1"},
        }],
    })  # fmt: skip

    schema_version: Literal[1] = 1
    submission_id: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:-]+$")
    owner: str = Field(default="local", min_length=1, max_length=128, description="Who may see the job.")
    request: JobRequest
    audio: Base64Bytes | None = Field(default=None, description="The recording itself, as base64.")

    @model_validator(mode="after")
    def _one_recording(self) -> Self:
        if self.request.edit is not None and (self.audio is None) == (self.request.source_key is None):
            raise ValueError("a submission holds either audio or request.source_key")
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


class Result(BaseModel):
    """How a job ended, on the topic editx.results; the key is the job's id. It may come more than once.

    `rejected` is for a submission that could not become a job; it has no `job_id`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    job_id: str = ""
    submission_id: str = Field(default="", description="Of the submission that asked for the job; empty for others.")
    owner: str = "local"
    state: SubmissionState
    result_keys: tuple[str, ...] = Field(
        default=(), description="Artifact keys of the audio of every iteration, first to last; empty unless done."
    )
    error: JobError | None = None
    created_at: float = Field(default=0.0, description="Unix seconds.")
    finished_at: float = Field(default=0.0, description="Unix seconds.")
    timings: tuple[StepTiming, ...] = ()

    @classmethod
    def of(cls, job: Job) -> Result:
        """The result of a job that has ended."""
        ends: dict[str, SubmissionState] = {"done": "done", "cancelled": "cancelled"}
        state = ends.get(job.state, "failed")
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
