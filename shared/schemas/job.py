"""The record of a job as the job store keeps it, and the events that its readers follow.

The record is data; the moves that it may make are in shared.jobs.machine. Times are Unix seconds by the job store's
clock.
"""

from __future__ import annotations

import os
import time
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from shared.schemas.request import JobRequest
from shared.schemas.route import Route, Step

SCHEMA_VERSION = 1


class JobState(StrEnum):
    """Where a job is. It only moves forward, and ends in exactly one of the last three."""

    ACCEPTED = "accepted"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


class JobError(BaseModel):
    """Why a job failed, or why its last attempt did."""

    model_config = ConfigDict(frozen=True)

    code: str
    message: str
    hint: str = ""
    retryable: bool = False
    dead_letter: bool = Field(
        default=False, description="Whether the failed step's message belongs with the dead letters."
    )


class LeaseState(BaseModel):
    """Who works on the current step.

    `token` grows with every lease of the job; a write with an older token is refused.
    """

    model_config = ConfigDict(frozen=True)

    owner: str
    token: int
    expires_at: float


class StepTiming(BaseModel):
    """When a finished step ran and how often it was tried.

    `metrics` holds what its handler measured, `artifacts` the SHA-256 of each artifact that the attempt which counted
    wrote, by name.
    """

    model_config = ConfigDict(frozen=True)

    index: int
    kind: str
    started_at: float
    finished_at: float
    attempts: int
    metrics: dict[str, float] = Field(default_factory=dict)
    artifacts: dict[str, str] = Field(default_factory=dict)


class Job(BaseModel):
    """Everything known about one job. Immutable: a move makes a new record, and the store swaps it in by `version`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    id: str
    version: int = Field(
        default=0, description="Grows by one with every stored change; the store's compare-and-set key."
    )
    owner: str = Field(default="local", description="Who may see the job.")
    state: JobState = JobState.ACCEPTED
    request: JobRequest
    route: Route
    step_index: int = 0
    attempts: int = Field(default=0, description="Attempts at the current step, the running one included.")
    progress: float = Field(default=0.0, ge=0.0, le=1.0)
    note: str = ""
    lease: LeaseState | None = None
    last_token: int = 0
    dispatched: int = Field(default=-1, description="Index of the last step whose message is known to be on the bus.")
    not_before: float = Field(default=0.0, description="The current step waits for a retry until then.")
    due_at: float = Field(default=0.0, description="The sweeper looks at the job from then on.")
    cancel_requested: bool = False
    deadline: float | None = None
    created_at: float
    updated_at: float
    started_at: float | None = None
    finished_at: float | None = None
    discarded: bool = Field(
        default=False, description="Its owner deleted it; the record stays until nobody asks for it."
    )
    expires_at: float | None = Field(default=None, description="Record and artifacts may be deleted from then on.")
    step_started_at: float | None = None
    timings: tuple[StepTiming, ...] = ()
    error: JobError | None = None
    reference: str = Field(default="", description="What the submitter calls the job; it comes back with the result.")
    trace: dict[str, str] = Field(
        default_factory=dict, description="W3C trace context of the request that made the job."
    )

    @property
    def is_terminal(self) -> bool:
        return self.state.is_terminal

    @property
    def step(self) -> Step:
        """The step that the job is at; the last one once it is done."""
        return self.route.steps[min(self.step_index, len(self.route) - 1)]

    @property
    def result_keys(self) -> list[str]:
        """Artifact keys of the audio of every iteration, first to last; all present once the job is done."""
        return self.route.result_keys(self.id)


EventType = Literal[
    "accepted", "started", "progress", "step", "retry", "cancel_requested", "done", "failed", "cancelled"
]


class JobEvent(BaseModel):
    """One line of a job's event log.

    `seq` starts at 1 and has no gaps, so a reader resumes from the last one it saw.
    """

    model_config = ConfigDict(frozen=True)

    seq: int = 0
    job_id: str
    at: float
    type: EventType
    state: JobState
    step_index: int
    progress: float
    note: str = ""
    data: dict[str, Any] = Field(default_factory=dict)

    @property
    def is_last(self) -> bool:
        return self.state.is_terminal


def new_job_id() -> str:
    """A fresh id, unguessable and sorted by time: job_ + 12 hex digits of milliseconds + 16 random ones."""
    return f"job_{int(time.time() * 1000):012x}{os.urandom(8).hex()}"
