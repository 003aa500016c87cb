"""The envelope on the bus: which step of which job is due.

The work itself is in the job store, so a message may come twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import PoisonError
from shared.schemas.job import Job
from shared.schemas.request import Lane
from shared.schemas.route import StepKind, topic_for

Headers = tuple[tuple[str, bytes], ...]
CONTENT_TYPE = "application/vnd.editx.step+json"
TRACE_HEADERS = ("traceparent", "tracestate", "baggage")


class BusMessage(BaseModel):
    """One step is due. The key on the bus is the job's id, which keeps the messages of a job in order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    job_id: str = Field(min_length=1, max_length=128)
    step_index: int = Field(ge=0)
    kind: StepKind
    attempt: int = Field(default=1, ge=1)
    lane: Lane = "interactive"
    deadline: float | None = Field(default=None, description="Unix seconds; the job fails if its work begins later.")
    trace: dict[str, str] = Field(default_factory=dict, description="W3C trace context of the sender.")

    @classmethod
    def for_step(cls, job: Job, trace: dict[str, str] | None = None) -> BusMessage:
        """The message that makes a worker do the job's current step."""
        return cls(
            job_id=job.id,
            step_index=job.step_index,
            kind=job.step.kind,
            attempt=job.attempts + 1,
            lane=job.request.lane,
            deadline=job.deadline,
            trace=trace or job.trace,
        )

    @property
    def topic(self) -> str:
        return topic_for(self.kind, self.lane)

    def to_record(self) -> tuple[str, bytes, Headers]:
        """Key, value and headers for the bus.

        The trace context goes into the headers, as W3C and OpenTelemetry want it.
        """
        headers = {
            "content-type": CONTENT_TYPE,
            "schema-version": str(self.schema_version),
            "job-id": self.job_id,
            "attempt": str(self.attempt),
            **{name: self.trace[name] for name in TRACE_HEADERS if name in self.trace},
        }
        value = self.model_dump_json(exclude={"trace"}).encode()
        return self.job_id, value, tuple((name, text.encode()) for name, text in headers.items())

    @classmethod
    def from_record(cls, value: bytes, headers: Iterable[tuple[str, bytes]]) -> BusMessage:
        """The message in a record. Raises PoisonError when it is no message of a known version."""
        trace = {name: data.decode("utf-8", "replace") for name, data in headers if name in TRACE_HEADERS}
        try:
            return cls.model_validate_json(value).model_copy(update={"trace": trace})
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors()[:3])
            raise PoisonError(
                f"Not a step message of a known version: {problems}.",
                "Publish it again with the schema of this release.",
            ) from error
