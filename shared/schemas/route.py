"""The route of a job: the ordered steps it goes through, and where each finds and leaves its artifacts.

Keys depend on the job's id and the step alone, so a step that runs twice writes the same object twice.
Knows nothing about buses, stores or models.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from shared.schemas.edit import Edit
from shared.schemas.request import JobRequest, Lane

StepKind = Literal["tokenize", "generate", "score", "decode", "train"]
KINDS: tuple[StepKind, ...] = ("tokenize", "generate", "score", "decode", "train")
LANES: tuple[Lane, ...] = ("interactive", "batch")
TOPIC_PREFIX = "editx."
DLQ_UNREADABLE = "editx.dlq.unreadable"
DLQ_FAILED = "editx.dlq.failed"

AUDIO = "audio.wav"
TOKENS = "tokens.safetensors"
GENERATED = "generated.safetensors"
SCORES = "scores.safetensors"


def topic_for(kind: StepKind, lane: Lane) -> str:
    """The topic that carries one kind of step: `editx.generate`, or `editx.generate.batch` for the batch lane."""
    return f"{TOPIC_PREFIX}{kind}" if lane == "interactive" else f"{TOPIC_PREFIX}{kind}.{lane}"


def job_prefix(job_id: str) -> str:
    """Where everything of one job lies in the artifact store."""
    return f"jobs/{job_id}/"


def source_key(job_id: str) -> str:
    """Where a job's recording lies unless the request names another key."""
    return f"{job_prefix(job_id)}source/audio"


class Step(BaseModel):
    """One step of a route: what to do, with which artifacts, and in which iteration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int = Field(ge=0)
    kind: StepKind
    iteration: int = Field(default=0, ge=0)
    inputs: dict[str, str] = Field(default_factory=dict, description="Input name to artifact key.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="Plain JSON values for the step's handler.")

    def output_key(self, job_id: str, name: str) -> str:
        """The key of an artifact that this step writes: jobs/{job_id}/{step index}-{kind}/{name}."""
        return f"{job_prefix(job_id)}{self.index}-{self.kind}/{name}"


class Route(BaseModel):
    """The steps of a job, in order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: tuple[Step, ...] = Field(min_length=1)

    def __len__(self) -> int:
        return len(self.steps)

    def result_keys(self, job_id: str) -> list[str]:
        """Artifact keys of the audio of every iteration, first to last."""
        return [step.output_key(job_id, AUDIO) for step in self.steps if step.kind == "decode"]


def candidate(index: int) -> str:
    """The artifact name of one of several candidates of a generate step."""
    return f"candidate-{index}.safetensors"


def build_route(job_id: str, request: JobRequest) -> Route:
    """The steps of a request: (tokenize, generate, decode) per iteration, with score before decode when there are
    candidates.

    Every iteration tokenises the audio of the one before it, as in the paper's iterated editing (arXiv 2511.03601);
    its seed is the request's plus the iteration's number.
    """
    if request.training is not None:
        parameters = {"recipe": request.training.recipe, "settings": request.training.settings, "seed": request.seed}
        return Route(steps=(Step(index=0, kind="train", parameters=parameters),))
    assert request.edit is not None  # JobRequest holds one or the other
    steps: list[Step] = []
    audio, text = request.source_key or source_key(job_id), request.text or ""
    for iteration in range(request.iterations):
        steps += _iteration(job_id, request, request.edit, iteration, len(steps), audio, text)
        audio = steps[-1].output_key(job_id, AUDIO)
        text = request.edit.target_text or text
    return Route(steps=tuple(steps))


def _iteration(
    job_id: str, request: JobRequest, edit: Edit, iteration: int, first: int, audio: str, text: str
) -> list[Step]:
    seed = (request.seed + iteration) % (2**31)
    tokenize = Step(
        index=first,
        kind="tokenize",
        iteration=iteration,
        inputs={"audio": audio},
        parameters={} if request.trim_before_mel is None else {"trim_before_mel": request.trim_before_mel},
    )
    tokens = tokenize.output_key(job_id, TOKENS)
    generate = Step(
        index=first + 1,
        kind="generate",
        iteration=iteration,
        inputs={"tokens": tokens},
        parameters={
            "edit": edit.model_dump(),
            "text": text,
            "seed": seed,
            "n_best": request.n_best,
            **request.generate.model_dump(),
        },
    )
    steps = [tokenize, generate]
    if request.n_best > 1:
        candidates = {candidate(i): generate.output_key(job_id, candidate(i)) for i in range(request.n_best)}
        steps.append(
            Step(
                index=first + 2,
                kind="score",
                iteration=iteration,
                inputs={"tokens": tokens, **candidates},
                parameters={"edit": edit.model_dump(), "text": text},
            )
        )
    last = iteration == request.iterations - 1
    steps.append(
        Step(
            index=first + len(steps),
            kind="decode",
            iteration=iteration,
            inputs={"tokens": tokens, "generated": steps[-1].output_key(job_id, GENERATED)},
            parameters={"seed": seed, "format": request.format if last else "wav", **request.decode.model_dump()},
        )
    )
    return steps
