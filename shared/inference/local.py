"""Models in this process.

Requests that come within a few milliseconds share one batch; each model runs in a thread of its own.

A model is made when it is first asked for. Knows nothing about what a model computes.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from shared.inference.port import (
    DeadlineExceeded,
    InferenceRequest,
    InferenceUnavailable,
    Model,
    Parameters,
    RequestCancelled,
    StreamingModel,
    Tensors,
    UnknownModel,
)
from shared.tallies import passed

WAKE_S = 0.05
STREAM_AHEAD = 4
_END: Final = object()

ModelFactory = Callable[[], Model]


def _never() -> bool:
    return False


@dataclass(eq=False)
class _Call:
    """One request on its way through a model's thread, and where its answer goes."""

    request: InferenceRequest
    streams: bool
    answers: queue.Queue[object] = field(default_factory=lambda: queue.Queue(STREAM_AHEAD))
    given_up: threading.Event = field(default_factory=threading.Event)

    @property
    def refusal(self) -> Exception | None:
        """Why the request should not be worked on any more."""
        if self.given_up.is_set():
            return RequestCancelled("The caller went away.")
        return refusal(self.request)

    def answer(self, value: object) -> None:
        while not self.given_up.is_set():
            with suppress(queue.Full):
                self.answers.put(value, timeout=WAKE_S)
                return


def refusal(request: InferenceRequest) -> Exception | None:
    """RequestCancelled or DeadlineExceeded if the request was given up or came too late, else None."""
    if request.cancelled():
        return RequestCancelled("The request was cancelled.")
    if request.deadline is not None and time.monotonic() > request.deadline:
        return DeadlineExceeded("The deadline passed before the model was done.")
    return None


class LocalInference:
    """An Inference over models of this process: name to a function that makes the model.

    Models named in `concurrent` batch for themselves and are called by each caller's own thread.
    """

    def __init__(
        self,
        models: Mapping[str, ModelFactory],
        *,
        concurrent: Collection[str] = (),
        max_batch: int = 8,
        max_delay_s: float = 0.005,
    ) -> None:
        self._runners = {name: _Runner(name, factory, max_batch, max_delay_s) for name, factory in models.items()}
        self._concurrent = frozenset(concurrent)
        self._ids = itertools.count()

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
        runner = self._runner(model)
        call = self._call(model, inputs, parameters, deadline, cancelled, priority, streams=False)
        if model in self._concurrent:
            return _tensors(_raised(runner.model().infer([call.request])[0]))
        runner.submit(call)
        try:
            return _tensors(_wait(call, runner))
        finally:
            call.given_up.set()

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
        runner = self._runner(model)
        call = self._call(model, inputs, parameters, deadline, cancelled, priority, streams=True)
        if model in self._concurrent:
            yield from _streaming(runner.model()).stream(call.request)
            return
        runner.submit(call)
        try:
            while (piece := _wait(call, runner)) is not _END:
                yield _tensors(piece)
        finally:
            call.given_up.set()

    def ready(self, model: str) -> bool:
        return model in self._runners and self._runners[model].is_open

    def load(self, model: str) -> Model:
        """The model itself, made now if it was not yet. Raises what its factory raises."""
        return self._runner(model).model()

    def close(self) -> None:
        for runner in self._runners.values():
            runner.close()

    def _runner(self, model: str) -> _Runner:
        if model not in self._runners:
            raise UnknownModel(f"No model {model!r} is served here.", f"There are: {', '.join(sorted(self._runners))}.")
        return self._runners[model]

    def _call(
        self,
        model: str,
        inputs: Tensors,
        parameters: Parameters | None,
        deadline: float | None,
        cancelled: Callable[[], bool] | None,
        priority: int,
        *,
        streams: bool,
    ) -> _Call:
        given_up = threading.Event()
        asked = cancelled or _never
        request = InferenceRequest(
            inputs=inputs,
            parameters=parameters or {},
            request_id=f"{model}-{next(self._ids)}",
            deadline=deadline,
            cancelled=lambda: given_up.is_set() or asked(),
            priority=priority,
        )
        return _Call(request, streams, given_up=given_up)


class _Runner:
    """One model, its queue (higher priority first, then by arrival) and its thread."""

    def __init__(self, name: str, factory: ModelFactory, max_batch: int, max_delay_s: float) -> None:
        self._name = name
        self._factory = factory
        self._max_batch = max_batch
        self._max_delay_s = max_delay_s
        self._queue: queue.PriorityQueue[tuple[int, int, _Call]] = queue.PriorityQueue()
        self._arrivals = itertools.count()
        self._lock = threading.Lock()
        self._made: Model | None = None
        self._thread: threading.Thread | None = None
        self.is_open = True

    def submit(self, call: _Call) -> None:
        with self._lock:
            if not self.is_open:
                raise InferenceUnavailable(f"The model {self._name} is closed.")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"model-{self._name}", daemon=True)
                self._thread.start()
        self._queue.put((-call.request.priority, next(self._arrivals), call))

    def model(self) -> Model:
        with self._lock:
            if not self.is_open:
                raise InferenceUnavailable(f"The model {self._name} is closed.")
            if self._made is None:
                self._made = self._factory()
            return self._made

    def close(self) -> None:
        with self._lock:
            self.is_open = False
            thread, close = self._thread, getattr(self._made, "close", None)
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5.0)
        if close is not None:
            close()

    def _run(self) -> None:
        while self.is_open:
            batch = self._gather()
            if not batch:
                continue
            try:
                model = self.model()
            except Exception as error:
                for call in batch:
                    call.answer(error)
                continue
            if batch[0].streams:
                _stream(model, batch[0])
            else:
                _infer(model, batch)

    def _gather(self) -> list[_Call]:
        """The next calls that may run together: one stream, or unary calls that came within the delay."""
        batch: list[_Call] = []
        until: float | None = None
        while len(batch) < self._max_batch:
            timeout = WAKE_S if until is None else until - time.monotonic()
            try:
                item = self._queue.get(timeout=max(timeout, 0.0)) if timeout > 0 else self._queue.get_nowait()
            except queue.Empty:
                break
            call = item[2]
            if refused := call.refusal:
                call.answer(refused)
            elif call.streams and batch:
                self._queue.put(item)
                break
            else:
                batch.append(call)
                until = until or time.monotonic() + self._max_delay_s
                if call.streams:
                    break
        return batch


def _infer(model: Model, batch: list[_Call]) -> None:
    passed(model.name, len(batch))
    try:
        answers = model.infer([call.request for call in batch])
    except Exception as error:
        if len(batch) == 1:
            return batch[0].answer(error)
        for call in batch:  # one bad request must not fail its neighbours
            _infer(model, [call])
        return None
    for call, answer in zip(batch, answers, strict=True):
        call.answer(answer)
    return None


def _stream(model: Model, call: _Call) -> None:
    try:
        for piece in _streaming(model).stream(call.request):
            call.answer(piece)
            if refused := call.refusal:
                return call.answer(refused)
        return call.answer(_END)
    except Exception as error:
        return call.answer(error)


def _wait(call: _Call, runner: _Runner) -> object:
    """The next answer of a call.

    Looks up often enough that a cancelled or late caller is let go while the model works.
    """
    while True:
        try:
            answer = call.answers.get(timeout=WAKE_S)
        except queue.Empty:
            if refused := call.refusal:
                raise refused from None
            if not runner.is_open:
                raise InferenceUnavailable("The models were closed.") from None
            continue
        return _raised(answer)


def _raised(answer: object) -> object:
    """The answer, or raise it if it is an exception; running out of memory is one that may pass."""
    if isinstance(answer, MemoryError) or type(answer).__name__ == "OutOfMemoryError":
        raise InferenceUnavailable(f"The model ran out of memory: {answer}")
    if isinstance(answer, Exception):
        raise answer
    return answer


def _streaming(model: Model) -> StreamingModel:
    if not isinstance(model, StreamingModel):
        raise UnknownModel(f"The model {model.name} does not stream.")
    return model


def _tensors(answer: object) -> Tensors:
    assert isinstance(answer, Mapping), f"a model answered with {type(answer).__name__}"
    return answer
