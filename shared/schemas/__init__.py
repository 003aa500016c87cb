"""The data that passes between services, versioned, each with a JSON schema. Knows nothing about who sends it."""

from shared.schemas.edit import Edit, EditType
from shared.schemas.job import Job, JobError, JobEvent, JobState, LeaseState, StepTiming, new_job_id
from shared.schemas.messages import BusMessage
from shared.schemas.request import DecodeSettings, GenerateSettings, JobRequest, Lane, TrainingRequest
from shared.schemas.route import Route, Step, StepKind, build_route, topic_for

__all__ = [
    "BusMessage",
    "DecodeSettings",
    "Edit",
    "EditType",
    "GenerateSettings",
    "Job",
    "JobError",
    "JobEvent",
    "JobRequest",
    "JobState",
    "Lane",
    "LeaseState",
    "Route",
    "Step",
    "StepKind",
    "StepTiming",
    "TrainingRequest",
    "build_route",
    "new_job_id",
    "topic_for",
]
