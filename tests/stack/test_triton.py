"""What is asked of the model server itself: models from a bucket, urgent calls first, bounded queues, deadlines."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from opentelemetry import context

from editx.stack import process, servers
from editx.stack.models import PREFIX, SPECS, write_repository
from editx.stack.process import free_ports
from editx.stack.stack import Stack
from shared import telemetry
from shared.errors import PermanentError
from shared.inference.port import DeadlineExceeded, InferenceUnavailable, RequestCancelled
from shared.inference.repository import ModelSpec, Tensor, render
from shared.inference.triton import TritonInference, connect

QUEUE = 8
SLOW = ModelSpec(
    "slow",
    inputs={"number": Tensor("FP32", (1,))},
    outputs={"number": Tensor("FP32", (1,))},
    max_batch={"cpu": 1, "gpu": 1},
    delay_us=0,
    queue=QUEUE,
)
MODEL = """
import time
from pathlib import Path

import triton_python_backend_utils  # noqa: F401

from shared.inference.shim import shim

class Slow:
    name = "slow"

    def __init__(self):
        self.version = float(Path({version!r}).read_text())

    def infer(self, requests):
        time.sleep(0.2)
        if any(request.inputs["number"] < 0 for request in requests):
            raise ArithmeticError("no numbers below zero")
        return [{{"number": request.inputs["number"] * self.version}} for request in requests]

TritonPythonModel = shim(lambda device: Slow())
"""


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the model multiplies with: its checkpoint, so to speak."""
    path = tmp_path_factory.mktemp("checkpoint") / "version"
    path.write_text("1")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server has its log."""
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def inference(stack: Stack, version: Path, folder: Path) -> Iterator[TritonInference]:
    store, port = stack.store(), free_ports(3)
    write_repository(stack.urls["EDITX_STORE_URL"])
    store.put(f"{PREFIX}/slow/config.pbtxt", render(SLOW, "cpu").encode())
    store.put(f"{PREFIX}/slow/1/model.py", MODEL.format(version=str(version)).encode())
    keys = {"AWS_ACCESS_KEY_ID": servers.ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": servers.SECRET_KEY}
    bucket = f"s3://http://127.0.0.1:{stack.server_ports['store']}/editx/{PREFIX}"
    environment = {**stack.environment, **keys, "EDITX_INFERENCE_URL": "", "HOME": str(folder)}
    program = servers.triton(port, [bucket], folder, environment, ["slow", "tokenizer"])
    running = process.start(program, folder / "log")
    try:
        process.wait_ready(program, running, folder / "log")
        client = connect(f"triton://127.0.0.1:{port + 1}")
        yield client
        client.close()
    finally:
        process.stop(running, program.stop_s)


def double(inference: TritonInference, number: float = 1.0, **how: object) -> float:
    answer = inference.infer("slow", {"number": np.array([number], np.float32)}, **how)  # type: ignore[arg-type]
    return float(answer["number"][0])


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def test_models_come_from_a_bucket(inference: TritonInference) -> None:
    audio = np.sin(np.arange(16_000, dtype=np.float32) / 20) / 2
    assert len(inference.infer("tokenizer", {"audio": audio}, parameters={"sample_rate_hz": 16_000})["semantic"]) > 20
    known = {model["name"]: model["state"] for model in inference.models()}
    assert known.keys() == {"slow", *(spec.name for spec in SPECS.values())}
    assert (known["tokenizer"], known["llm"]) == ("READY", "")


def test_an_urgent_call_overtakes_those_that_wait(inference: TritonInference) -> None:
    ended: list[str] = []
    with ThreadPoolExecutor(8) as pool:

        def call(name: str, priority: int) -> None:
            double(inference, priority=priority)
            ended.append(name)

        waiting = [pool.submit(call, "chunk", 1) for _ in range(5)]
        time.sleep(0.1)
        first = pool.submit(call, "first chunk", 2)
        for one in (*waiting, first):
            one.result(timeout=10)
    assert ended.index("first chunk") <= 2  # behind the one that ran, and one that was handed over already


def test_a_full_queue_refuses_and_says_that_trying_again_may_help(inference: TritonInference) -> None:
    with ThreadPoolExecutor(QUEUE + 8) as pool:
        calls = [pool.submit(double, inference) for _ in range(QUEUE + 8)]
        failures = [error for one in calls if (error := one.exception(timeout=20))]
    assert 0 < len(failures) <= 8
    assert {type(error) for error in failures} == {InferenceUnavailable}


def test_a_deadline_ends_a_call_that_waits(inference: TritonInference) -> None:
    with ThreadPoolExecutor(4) as pool:
        ahead = [pool.submit(double, inference) for _ in range(4)]
        time.sleep(0.1)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            double(inference, deadline=began + 0.2)
        assert time.monotonic() - began < 0.4
        for one in ahead:
            one.result(timeout=10)


def test_a_caller_who_leaves_ends_the_call(inference: TritonInference) -> None:
    left = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        ahead = [pool.submit(double, inference) for _ in range(3)]
        caller = pool.submit(double, inference, cancelled=left.is_set)
        time.sleep(0.05)
        left.set()
        assert isinstance(caller.exception(timeout=0.4), RequestCancelled)
        for one in ahead:
            one.result(timeout=10)


def test_what_fails_in_a_model_is_in_its_log_with_the_ids_of_job_and_trace(
    inference: TritonInference, folder: Path
) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    traced = context.attach(telemetry.extract({"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}))
    try:
        with telemetry.log_fields(job_id="job_7"), pytest.raises(PermanentError, match="no numbers below zero"):
            double(inference, -1.0)
    finally:
        context.detach(traced)
    [line] = [json.loads(line) for line in (folder / "log").read_text().splitlines() if '"a call failed"' in line]
    assert (line["job_id"], line["trace_id"]) == ("job_7", trace_id)
    assert "ArithmeticError" in line["exception"]


def test_a_new_version_goes_live_and_no_call_fails(inference: TritonInference, version: Path) -> None:
    seen: list[float] = []
    stop = threading.Event()

    def call() -> None:
        while not stop.is_set():
            seen.append(double(inference))

    with ThreadPoolExecutor(2) as pool:
        callers = [pool.submit(call) for _ in range(2)]
        assert within(5, lambda: seen.count(1.0) >= 2)
        version.write_text("2")
        inference.load("slow")
        after = double(inference)
        stop.set()
        for one in callers:
            one.result(timeout=10)  # raises what a call raised
    assert after == 2.0  # the old one may still end what it had when the new one began
    assert set(seen) <= {1.0, 2.0}
