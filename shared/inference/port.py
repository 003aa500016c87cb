"""The port for models: tensors and parameters in, tensors out, one call or a stream.

What runs a model, and where, is the adapter's.

A `Model` is the unit that an owner writes once: it takes a batch of requests and runs in process or behind a model
server. `Inference` is what step handlers call. Text travels in parameters; tensors are numpy arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy.typing as npt

from shared.errors import EditxError, TransientError, UserError

Tensors = Mapping[str, npt.NDArray[Any]]
Parameters = Mapping[str, str | int | float | bool]


def given(**parameters: str | int | float | bool | None) -> dict[str, str | int | float | bool]:
    """Parameters without those that are None: the model's own values hold there."""
    return {name: value for name, value in parameters.items() if value is not None}


class InferenceUnavailable(TransientError):
    """The model or its server is away, overloaded, or out of memory for now."""

    default_code = "inference_unavailable"


class UnknownModel(UserError):
    """No model of this name is served."""

    default_code = "unknown_model"
    default_http_status = 404


class RequestCancelled(EditxError):
    """The caller gave the request up while the model worked on it."""

    default_code = "cancelled"
    default_http_status = 499


class DeadlineExceeded(EditxError):
    """The request's deadline passed before its answer was ready."""

    default_code = "deadline_exceeded"
    default_http_status = 504


def _never() -> bool:
    return False


@dataclass(frozen=True, eq=False)
class InferenceRequest:
    """One request as a model sees it.

    `deadline` is by time.monotonic(); `cancelled` is cheap and may be asked at every step.
    """

    inputs: Tensors
    parameters: Parameters = field(default_factory=dict)
    request_id: str = ""
    deadline: float | None = None
    cancelled: Callable[[], bool] = _never
    priority: int = 0


@runtime_checkable
class Model(Protocol):
    """A model that runs anywhere. It need not be thread safe: an adapter calls it from one thread at a time."""

    name: str

    def infer(self, requests: Sequence[InferenceRequest]) -> list[Tensors | Exception]:
        """One answer per request, in order; a request that failed alone is answered with its exception."""
        ...


@runtime_checkable
class StreamingModel(Model, Protocol):
    """A model that can also hand out an answer in pieces."""

    def stream(self, request: InferenceRequest) -> Iterator[Tensors]:
        """The pieces of the answer, each as soon as it is ready. Closing the iterator stops the work."""
        ...


class Inference(Protocol):
    """What handlers call. Every method may be called by any thread."""

    def infer(
        self,
        model: str,
        inputs: Tensors,
        *,
        parameters: Parameters | None = None,
        deadline: float | None = None,
        cancelled: Callable[[], bool] | None = None,
        priority: int = 0,
    ) -> Tensors:
        """The model's answer. Higher `priority` goes first.

        Raises UnknownModel, InferenceUnavailable, RequestCancelled, DeadlineExceeded, or the model's own EditxError.
        """
        ...

    def stream(
        self,
        model: str,
        inputs: Tensors,
        *,
        parameters: Parameters | None = None,
        deadline: float | None = None,
        cancelled: Callable[[], bool] | None = None,
        priority: int = 0,
    ) -> Iterator[Tensors]:
        """The pieces of the model's answer; closing the iterator cancels the rest.

        Raises as `infer` does, from the iterator.
        """
        ...

    def ready(self, model: str) -> bool:
        """Whether a call of `model` would be served now."""
        ...

    def close(self) -> None:
        """Stop serving. Safe to call twice."""
        ...
