"""The inside of a Triton Python model: hands the server's requests to a Model of this project, and its answers back.

A model's 1/model.py is `TritonPythonModel = shim(...)` and nothing else. Knows nothing about what a model computes.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb  # exists inside the server only

from shared import telemetry
from shared.errors import EditxError
from shared.inference.port import InferenceRequest, InferenceUnavailable, Model, RequestCancelled, Tensors
from shared.inference.wire import CALL, DEVICE, Call, pack_error
from shared.tallies import passed

log = logging.getLogger(__name__)
CANCEL_CHECK_S = 0.02


def shim(make: Callable[[str], Model], *, concurrent: bool = False) -> type:
    """The class `TritonPythonModel` over the model that `make` makes for a device ("cpu", "cuda:0").

    A `concurrent` model batches for itself: each request gets a thread. Any other is called by one thread with all
    requests that the server batched.
    """

    class TritonPythonModel:
        """What the server drives."""

        def initialize(self, args: dict[str, str]) -> None:
            config = json.loads(args["model_config"])
            self.outputs = {output["name"]: pb.triton_string_to_numpy(output["data_type"])
                            for output in config["output"]}  # fmt: skip
            self.is_batched = config["max_batch_size"] > 0
            self.is_decoupled = pb.using_decoupled_model_transaction_policy(config)
            telemetry.configure_logs(os.environ.get("EDITX_LOG_LEVEL", "INFO"))
            spans, endpoint = os.environ.get("EDITX_SPANS_FILE"), os.environ.get("EDITX_OTLP_ENDPOINT")
            spans_file = Path(spans) if spans else None
            self.end_telemetry = telemetry.configure(
                f"triton-{args['model_name']}", spans_file=spans_file, otlp_endpoint=endpoint or None
            )
            self.model = make(_device(config, args))
            self.pool = ThreadPoolExecutor(256 if concurrent else 1, thread_name_prefix="shim")

        def execute(self, requests: list[Any]) -> list[Any] | None:
            calls = [_Call(request, self) for request in requests]
            if not self.is_decoupled:
                return [call.response(answer) for call, answer in zip(calls, self._infer(calls), strict=True)]
            if concurrent:
                for call in calls:
                    self.pool.submit(self._serve, [call])
            else:
                self._serve(calls)
            return None

        def finalize(self) -> None:
            self.pool.shutdown(wait=True, cancel_futures=True)
            if close := getattr(self.model, "close", None):
                close()
            self.end_telemetry()

        def _serve(self, calls: list[_Call]) -> None:
            """Answer calls of a decoupled model; every one gets its final flag, whatever happens."""
            whole = [call for call in calls if not call.streams]
            try:
                for call, answer in zip(whole, self._infer(whole), strict=True):
                    call.send(answer)
                for call in calls:
                    if call.streams:
                        self._stream(call)
            except Exception as error:
                log.exception("a call failed")
                for call in calls:
                    call.send(error)
            finally:
                for call in calls:
                    call.finish()

        def _infer(self, calls: Sequence[_Call]) -> Sequence[Tensors | Exception]:
            if not calls:
                return []
            if not concurrent:
                passed(self.model.name, len(calls))
            with (
                telemetry.span(f"triton {self.model.name}", {"editx.batch_size": len(calls)}, calls[0].trace),
                telemetry.log_fields(**_log_fields(calls)),
            ):
                try:
                    return self.model.infer([call.request for call in calls])
                except Exception as error:
                    if len(calls) == 1:
                        if not isinstance(error, EditxError):
                            log.exception("a call failed")
                        return [_passing(error)]
                return [self._infer([call])[0] for call in calls]  # one bad request must not fail its neighbours

        def _stream(self, call: _Call) -> None:
            with (
                telemetry.span(f"triton {self.model.name} stream", {}, call.trace),
                telemetry.log_fields(**_log_fields([call])),
            ):
                try:
                    pieces: Iterator[Tensors] = self.model.stream(call.request)  # type: ignore[attr-defined]
                    for piece in pieces:
                        if call.request.cancelled():
                            return call.send(RequestCancelled("The caller went away."))
                        call.send(piece)
                except Exception as error:
                    if not isinstance(error, EditxError):
                        log.exception("a stream failed")
                    call.send(_passing(error))

    return TritonPythonModel


class _Call:
    """One request of the server."""

    def __init__(self, request: Any, owner: Any) -> None:
        call = Call.unpack(json.loads(request.parameters())[CALL])
        self.streams, self.trace, self.log_fields = call.streams, call.trace, call.log_fields
        self._owner = owner
        self._sender = request.get_response_sender() if owner.is_decoupled else None
        asked = self._sender.is_cancelled if self._sender is not None else request.is_cancelled
        inputs = {tensor.name(): _array(tensor, owner.is_batched) for tensor in request.inputs()}
        self.request = InferenceRequest(
            inputs=inputs,
            parameters=call.parameters,
            request_id=request.request_id(),
            deadline=None if call.left_s is None else time.monotonic() + call.left_s,
            cancelled=_Seldom(asked),
            priority=call.priority,
        )

    def response(self, answer: Tensors | Exception) -> Any:
        if isinstance(answer, Exception):
            return pb.InferenceResponse(error=pb.TritonError(pack_error(answer)))
        tensors = []
        for name, array in answer.items():
            ready = np.array(np.atleast_1d(array), dtype=self._owner.outputs[name], order="C")
            tensor = torch.from_numpy(ready[None] if self._owner.is_batched else ready)
            # numpy gives an empty array strides of 0, which the server does not take for contiguous.
            tensors.append(pb.Tensor.from_dlpack(name, tensor.clone(memory_format=torch.contiguous_format)))
        return pb.InferenceResponse(output_tensors=tensors)

    def send(self, answer: Tensors | Exception) -> None:
        if self._sender is not None and not self._sender.is_cancelled():
            self._sender.send(self.response(answer))

    def finish(self) -> None:
        if self._sender is not None:
            self._sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            self._sender = None


def _log_fields(calls: Sequence[_Call]) -> dict[str, object]:
    """What log lines about these calls carry: the fields of one, or the ids of the jobs that share a batch."""
    if len(calls) == 1:
        return dict(calls[0].log_fields)
    return {"job_ids": [call.log_fields["job_id"] for call in calls if "job_id" in call.log_fields]}


class _Seldom:
    """Asks the server whether a request was cancelled, at most every 20 ms, since each question crosses a process."""

    def __init__(self, ask: Callable[[], bool]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._next_at = 0.0
        self._answer = False

    def __call__(self) -> bool:
        with self._lock:
            if not self._answer and time.monotonic() >= self._next_at:
                self._answer = bool(self._ask())
                self._next_at = time.monotonic() + CANCEL_CHECK_S
            return self._answer


def _device(config: dict[str, Any], args: dict[str, str]) -> str:
    kind = str(config.get("parameters", {}).get(DEVICE, {}).get("string_value", "cpu"))
    return f"cuda:{args['model_instance_device_id']}" if kind == "cuda" else kind


def _array(tensor: Any, is_batched: bool) -> Any:
    """A tensor as a copy without the batch axis, since the server's memory may not be kept.

    DLPack is used both ways: the stubs of older servers read numpy's arrays by the layout that numpy had before 2.0.
    """
    array = np.from_dlpack(tensor)
    return np.array(array[0] if is_batched else array)


def _passing(error: Exception) -> Exception:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return InferenceUnavailable(f"The model ran out of memory: {error}")
    return error
