"""An Inference through Triton Inference Server's gRPC protocol: unary calls and streams, each with cancel and deadline.

Which models answer through streams (decoupled ones), and the shapes they take, is asked of the server once.
"""

from __future__ import annotations

import itertools
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import grpc  # type: ignore[import-untyped]
import numpy as np
from tritonclient.grpc import InferenceServerClient, InferResult, model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, triton_to_np_dtype

from shared import telemetry
from shared.inference.port import (
    DeadlineExceeded,
    InferenceUnavailable,
    Parameters,
    RequestCancelled,
    Tensors,
    UnknownModel,
)
from shared.inference.wire import CALL, SCALARS, Call, level_of, unpack_error

WAKE_S = 0.02
CHANNEL: Final = (
    ("grpc.max_receive_message_length", 256 << 20),
    ("grpc.max_send_message_length", 256 << 20),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
"""A server that comes back is found within seconds; gRPC's own wait grows to two minutes. Calls and questions about
readiness have the same options, so they share one connection and see the same."""
_END: Final = object()


def connect(url: str) -> TritonInference:
    """triton://host:port of the server's gRPC endpoint"""
    return TritonInference(urlsplit(url).netloc)


@dataclass(frozen=True)
class _Facts:
    """What a client must know of a served model."""

    is_decoupled: bool
    is_batched: bool
    scalars: frozenset[str]
    inputs: Mapping[str, Any]


class TritonInference:
    """An Inference at `server` ("host:port")."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._channel = grpc.insecure_channel(server, options=CHANNEL)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._control = InferenceServerClient(server, channel_args=list(CHANNEL))
        self._facts: dict[str, _Facts] = {}
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._closed = False

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
        facts = self._know(model)
        request, metadata = self._request(model, facts, inputs, parameters, deadline, priority, streams=False)
        if facts.is_decoupled:
            answers = list(self._pieces(model, facts, request, metadata, deadline, cancelled))
            if len(answers) != 1:
                raise InferenceUnavailable(f"The model {model} gave {len(answers)} answers to one request.")
            return answers[0]
        call = self._stub.ModelInfer.future(request, timeout=_left(deadline), metadata=metadata)
        done = threading.Event()
        call.add_done_callback(lambda _: done.set())
        try:
            while not done.wait(WAKE_S):
                _check(deadline, cancelled)
            return _tensors(call.result(), facts)
        except grpc.RpcError as error:
            raise self._error(model, error) from error
        finally:
            call.cancel()

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
        facts = self._know(model)
        if not facts.is_decoupled:
            raise UnknownModel(f"The model {model} does not stream.")
        request, metadata = self._request(model, facts, inputs, parameters, deadline, priority, streams=True)
        yield from self._pieces(model, facts, request, metadata, deadline, cancelled)

    def ready(self, model: str) -> bool:
        try:
            return not self._closed and bool(self._control.is_model_ready(model, client_timeout=5.0))
        except (InferenceServerException, grpc.RpcError):
            return False

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._channel.close()
        self._control.close()

    # Operations, for `editx models` and for upgrades.

    def models(self) -> list[dict[str, str]]:
        """The models of the server's repositories: name, version, state and reason."""
        index = self._operate(lambda: self._control.get_model_repository_index(as_json=True, client_timeout=10.0))
        return [{key: str(found.get(key, "")) for key in ("name", "version", "state", "reason")}
                for found in index.get("models", [])]  # fmt: skip

    def load(self, model: str, timeout_s: float = 600.0) -> None:
        """Load a model, or load it again: calls are served by the old instance until the new one is ready.

        Triton skips a load when the model's files are those it has, and a new checkpoint is none of them. So a model
        that is there is loaded by its own configuration with the time added, which is a change.
        """
        known = self._configuration(model)
        if known is not None:
            known.setdefault("parameters", {})["loaded_at_ns"] = {"string_value": str(time.time_ns())}
        config = None if known is None else json.dumps(known)
        self._operate(lambda: self._control.load_model(model, config=config, client_timeout=timeout_s))
        self._facts.pop(model, None)

    def _configuration(self, model: str) -> dict[str, Any] | None:
        """The configuration of a loaded model; None when it is not loaded."""
        try:
            found = self._control.get_model_config(model, as_json=True, client_timeout=10.0)
        except InferenceServerException:
            return None
        return dict(found["config"])

    def unload(self, model: str) -> None:
        """Take a model away when the calls that run have ended."""
        self._operate(lambda: self._control.unload_model(model, client_timeout=60.0))
        self._facts.pop(model, None)

    def _operate(self, operation: Callable[[], Any]) -> Any:
        try:
            return operation()
        except InferenceServerException as error:
            raise InferenceUnavailable(f"Triton at {self._server} refused: {error.message()}") from error

    def _know(self, model: str) -> _Facts:
        if self._closed:
            raise InferenceUnavailable("The inference is closed.")
        if model not in self._facts:
            try:
                config = self._control.get_model_config(model, client_timeout=10.0).config
            except InferenceServerException as error:
                raise self._status_error(model, error.status() or "", error.message() or "") from error
            self._facts[model] = _Facts(
                is_decoupled=config.model_transaction_policy.decoupled,
                is_batched=config.max_batch_size > 0,
                scalars=frozenset(config.parameters[SCALARS].string_value.split(",")),
                inputs={tensor.name: _dtype(tensor.data_type) for tensor in config.input},
            )
        return self._facts[model]

    def _request(
        self,
        model: str,
        facts: _Facts,
        inputs: Tensors,
        parameters: Parameters | None,
        deadline: float | None,
        priority: int,
        *,
        streams: bool,
    ) -> tuple[Any, tuple[tuple[str, str], ...]]:
        if deadline is not None and deadline <= time.monotonic():
            raise DeadlineExceeded("The deadline passed before the model was asked.")
        trace, left_s = telemetry.inject(), _left(deadline)
        call = Call(parameters or {}, streams, left_s, priority, trace, telemetry.current_log_fields())
        request = service_pb2.ModelInferRequest(model_name=model, id=f"{model}-{next(self._ids)}")
        request.parameters[CALL].string_param = call.pack()
        request.parameters["priority"].uint64_param = level_of(priority)
        request.parameters["triton_enable_empty_final_response"].bool_param = facts.is_decoupled
        if left_s is not None:
            request.parameters["timeout"].int64_param = max(int(left_s * 1e6), 1)
        for name, array in inputs.items():
            ready = np.ascontiguousarray(array[None] if facts.is_batched else array, facts.inputs.get(name))
            tensor = request.inputs.add(name=name, datatype=np_to_triton_dtype(ready.dtype))
            tensor.shape.extend(ready.shape)
            request.raw_input_contents.append(ready.tobytes())
        return request, tuple(trace.items())

    def _pieces(
        self,
        model: str,
        facts: _Facts,
        request: Any,
        metadata: tuple[tuple[str, str], ...],
        deadline: float | None,
        cancelled: Callable[[], bool] | None,
    ) -> Iterator[Tensors]:
        """The answers of one request on a stream of its own, which is cancelled when the caller leaves."""
        more: queue.Queue[object] = queue.Queue()
        hold = threading.Event()
        call = self._stub.ModelStreamInfer(_once_and_hold(request, hold), timeout=_left(deadline), metadata=metadata)

        def receive() -> None:
            try:
                for response in call:
                    more.put(response)
                more.put(_END)
            except grpc.RpcError as error:
                more.put(error)

        threading.Thread(target=receive, name="triton-stream", daemon=True).start()
        try:
            while True:
                try:
                    found = more.get(timeout=WAKE_S)
                except queue.Empty:
                    _check(deadline, cancelled)
                    continue
                if found is _END:
                    return
                if isinstance(found, grpc.RpcError):
                    raise self._error(model, found) from found
                response: Any = found
                if response.error_message:
                    raise self._status_error(model, "", response.error_message)
                if response.infer_response.outputs:
                    yield _tensors(response.infer_response, facts)
                    _check(deadline, cancelled)
                if response.infer_response.parameters["triton_final_response"].bool_param:
                    return
        finally:
            hold.set()
            call.cancel()

    def _error(self, model: str, error: grpc.RpcError) -> Exception:
        if not isinstance(error, grpc.Call):
            return self._status_error(model, "", str(error))
        return self._status_error(model, str(error.code()), error.details() or "")

    def _status_error(self, model: str, status: str, message: str) -> Exception:
        if known := unpack_error(message):
            return known
        if "DEADLINE_EXCEEDED" in status or "timeout expired" in message.lower():
            return DeadlineExceeded("The deadline passed before the model was done.")
        if "CANCELLED" in status or "cancelled" in message.lower():
            return RequestCancelled("The request was cancelled.")
        if "unknown model" in message.lower() or "is not found" in message.lower():
            self._facts.pop(model, None)
            return UnknownModel(f"No model {model!r} is served at {self._server}.")
        self._facts.pop(model, None)
        return InferenceUnavailable(f"Triton at {self._server} did not serve {model}: {message or status}.",
                                    "Check that it runs and has room.")  # fmt: skip


def _once_and_hold(request: Any, hold: threading.Event) -> Iterator[Any]:
    """One request, then an open stream until the answers are in: closing it would cancel nothing but end the call."""
    yield request
    hold.wait()


def _dtype(data_type: int) -> Any:
    return triton_to_np_dtype(model_config_pb2.DataType.Name(data_type).removeprefix("TYPE_"))


def _tensors(response: Any, facts: _Facts) -> Tensors:
    result = InferResult(response)
    found: dict[str, Any] = {}
    for name in [output.name for output in response.outputs]:
        array = result.as_numpy(name)
        array = array[0] if facts.is_batched else array
        found[name] = array.reshape(()) if name in facts.scalars else array
    return found


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - time.monotonic(), 0.001)


def _check(deadline: float | None, cancelled: Callable[[], bool] | None) -> None:
    if cancelled is not None and cancelled():
        raise RequestCancelled("The request was cancelled.")
    if deadline is not None and time.monotonic() > deadline:
        raise DeadlineExceeded("The deadline passed before the model was done.")
