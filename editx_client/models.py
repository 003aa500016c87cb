"""What the gateway answers with. Fields that a newer gateway adds are ignored. Times are Unix seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

ENDED = frozenset({"done", "failed", "cancelled"})


@dataclass(frozen=True)
class Document:
    """Base: made from a JSON object."""

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The known fields of a JSON object."""
        known = {one.name for one in fields(cls)}
        return cls(**{name: value for name, value in document.items() if name in known})


@dataclass(frozen=True)
class Audio(Document):
    """The audio of one iteration. `url` may be read by anybody until it expires."""

    iteration: int
    format: str
    href: str
    url: str
    url_expires_at: float


@dataclass(frozen=True)
class Step(Document):
    """A finished step of a job."""

    index: int
    kind: str
    seconds: float
    attempts: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class JobError(Document):
    """Why a job failed."""

    code: str
    message: str
    hint: str = ""
    retryable: bool = False


@dataclass(frozen=True)
class Job(Document):
    """One edit or clone."""

    id: str
    status: str
    progress: float
    stage: str | None = None
    note: str = ""
    edit: dict[str, Any] | None = None
    text: str | None = None
    iterations: int = 1
    n_best: int = 1
    seed: int = 0
    format: str = "wav"
    lane: str = "interactive"
    cancel_requested: bool = False
    created_at: float = 0.0
    started_at: float | None = None
    finished_at: float | None = None
    expires_at: float | None = None
    audio: tuple[Audio, ...] = ()
    steps: tuple[Step, ...] = ()
    error: JobError | None = None
    warnings: tuple[str, ...] = ()
    trace_id: str | None = None

    @property
    def is_ended(self) -> bool:
        return self.status in ENDED

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        error = document.get("error")
        return super().from_json(
            {
                **document,
                "audio": tuple(Audio.from_json(one) for one in document.get("audio", ())),
                "steps": tuple(Step.from_json(one) for one in document.get("steps", ())),
                "error": JobError.from_json(error) if error else None,
                "warnings": tuple(document.get("warnings", ())),
            }
        )


@dataclass(frozen=True)
class JobPage(Document):
    """Some jobs, newest first; `next_cursor` gets the next page."""

    data: tuple[Job, ...]
    next_cursor: str | None = None

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(tuple(Job.from_json(one) for one in document["data"]), document.get("next_cursor"))


@dataclass(frozen=True)
class Event(Document):
    """Something that happened to a job. The last one carries the job."""

    seq: int
    job_id: str
    at: float
    type: str
    state: str
    step_index: int
    progress: float
    note: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    job: Job | None = None

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        job = document.get("job")
        return super().from_json({**document, "job": Job.from_json(job) if job else None})


@dataclass(frozen=True)
class Batch(Document):
    """Many jobs under one id."""

    id: str
    status: str
    created_at: float
    counts: dict[str, int]
    jobs: list[str]


@dataclass(frozen=True)
class Upload(Document):
    """A place to PUT a recording to."""

    id: str
    url: str
    url_expires_at: float
    expires_at: float
    max_bytes: int


@dataclass(frozen=True)
class Voice(Document):
    """A stored voice."""

    id: str
    name: str
    text: str
    duration_s: float
    sha256: str
    created_at: float
    consent: dict[str, Any]
