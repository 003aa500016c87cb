"""A step without a system around it, for the tests of handlers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shared.artifacts import Tokenized
from shared.inference.port import Parameters, Tensors
from shared.jobs import machine
from shared.schemas import Job, JobRequest
from shared.schemas.route import Step


@dataclass
class FakeStep:
    """A StepContext over dictionaries: the step at `index` of a request's route."""

    request: JobRequest
    index: int
    inputs: dict[str, bytes]
    written: dict[str, bytes] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    deadline: float | None = None
    priority: int = 1

    @property
    def job(self) -> Job:
        job = machine.accept(self.request, 0.0, job_id="job_1").job
        return job.model_copy(update={"step_index": self.index})

    @property
    def step(self) -> Step:
        return self.job.step

    def read(self, name: str) -> bytes:
        assert name in self.step.inputs
        return self.inputs[name]

    def write(self, name: str, data: bytes, content_type: str = "application/octet-stream") -> None:
        self.written[name] = data

    def progress(self, fraction: float, note: str = "") -> None:
        assert 0.0 <= fraction <= 1.0

    def measure(self, name: str, value: float) -> None:
        self.metrics[name] = value

    def cancelled(self) -> bool:
        return False

    def check_cancelled(self) -> None:
        return


@dataclass
class FakeInference:
    """An Inference that answers with a function and remembers what it was asked."""

    answer: Callable[[Tensors, Parameters], Tensors]
    calls: list[tuple[str, Tensors, Parameters]] = field(default_factory=list)

    def infer(self, model: str, inputs: Tensors, *, parameters: Parameters | None = None, **_: Any) -> Tensors:
        self.calls.append((model, inputs, parameters or {}))
        return self.answer(inputs, parameters or {})

    def stream(self, model: str, inputs: Tensors, **_: Any) -> Iterator[Tensors]:
        yield self.infer(model, inputs)

    def ready(self, model: str) -> bool:
        return True

    def close(self) -> None:
        return


def tokenized(groups: int = 10) -> Tokenized:
    """Codes of `groups` groups (120 ms each) with a reference to match."""
    return Tokenized(
        linguistic=np.arange(groups * 2, dtype=np.int32),
        semantic=np.arange(groups * 3, dtype=np.int32),
        speaker_embedding=np.full(192, 0.1, np.float32),
        prompt_mel=np.zeros((groups * 6, 80), np.float32),
        duration_s=groups * 0.12,
    )
