"""The promises of inference, against a model of a few lines. Adapters that need a server serve the same model."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from shared.errors import PermanentError
from shared.inference.local import LocalInference
from shared.inference.port import (
    DeadlineExceeded,
    Inference,
    InferenceUnavailable,
    RequestCancelled,
    UnknownModel,
)
from shared.inference.triton import TritonInference
from shared.tallies import PASSES, ROWS, counts
from tests.fixtures.doubler import Doubler
from tests.fixtures.servers import shared_servers


@pytest.fixture
def model() -> Doubler:
    return Doubler()


@pytest.fixture(params=["local", "triton"])
def inference(request: pytest.FixtureRequest, model: Doubler) -> Iterator[Inference]:
    adapter: Inference
    if request.param == "local":
        adapter = LocalInference({"doubler": lambda: model}, max_delay_s=0.05)
    else:
        adapter = TritonInference(shared_servers().doubler)
    yield adapter
    adapter.close()


def observed(inference: Inference) -> tuple[float, float]:
    """The model's largest batch and the number of pieces it streamed so far."""
    largest, streamed = inference.infer("doubler", {"x": X}, parameters={"report": True})["y"]
    return float(largest), float(streamed)


def test_passes_and_the_requests_in_them_are_counted(model: Doubler) -> None:
    before = counts(PASSES).get("doubler", 0), counts(ROWS).get("doubler", 0)
    local = LocalInference({"doubler": lambda: model}, max_delay_s=0.2)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: local.infer("doubler", {"x": X}), range(4)))
    local.close()
    assert counts(ROWS)["doubler"] - before[1] == 4
    assert counts(PASSES)["doubler"] - before[0] == len(model.batches) < 4


def test_a_model_that_batches_for_itself_is_called_by_every_caller(model: Doubler) -> None:
    direct = LocalInference({"doubler": lambda: model}, concurrent=["doubler"])
    began = time.monotonic()
    threads = [
        threading.Thread(target=direct.infer, args=("doubler", {"x": X}), kwargs={"parameters": {"wait_s": 0.3}})
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < 1.0
    assert [piece["y"].tolist() for piece in direct.stream("doubler", {"x": X})] == [[2.0], [4.0], [6.0]]
    with pytest.raises(PermanentError):
        direct.infer("doubler", {"x": X}, parameters={"fail": True})
    direct.close()
    with pytest.raises(InferenceUnavailable):
        direct.infer("doubler", {"x": X})


X = np.asarray([1.0, 2.0, 3.0], np.float32)


def test_an_answer_holds_the_models_tensors(inference: Inference) -> None:
    assert inference.ready("doubler")
    answer = inference.infer("doubler", {"x": X})
    np.testing.assert_array_equal(answer["y"], X * 2)
    assert (answer["total"].shape, float(answer["total"])) == ((), 12.0)


def test_a_stream_hands_out_pieces_in_order(inference: Inference) -> None:
    pieces = [piece["y"].tolist() for piece in inference.stream("doubler", {"x": X})]
    assert pieces == [[2.0], [4.0], [6.0]]


def test_a_piece_may_be_empty(inference: Inference) -> None:
    pieces = [piece["y"].tolist() for piece in inference.stream("doubler", {"x": X}, parameters={"end": True})]
    assert pieces == [[2.0], [4.0], [6.0], []]


def test_an_unknown_model_is_refused(inference: Inference) -> None:
    assert not inference.ready("nobody")
    with pytest.raises(UnknownModel):
        inference.infer("nobody", {"x": X})
    with pytest.raises(UnknownModel):
        list(inference.stream("nobody", {"x": X}))


def test_the_models_error_comes_back_with_its_code_and_hint(inference: Inference) -> None:
    with pytest.raises(PermanentError) as raised:
        inference.infer("doubler", {"x": X}, parameters={"fail": True})
    assert (raised.value.code, raised.value.hint) == ("asked_to_fail", "Ask for something else.")


def test_requests_that_come_together_share_a_batch_and_fail_alone(inference: Inference) -> None:
    answers: dict[int, object] = {}

    def ask(number: int) -> None:
        try:
            parameters = {"fail": number == 2}
            answers[number] = inference.infer("doubler", {"x": X * number}, parameters=parameters)["y"].tolist()
        except PermanentError as error:
            answers[number] = error.code

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {number: (X * number * 2).tolist() for number in range(4)}
    assert answers == {**expected, 2: "asked_to_fail"}
    assert observed(inference)[0] > 1


def test_a_late_answer_raises_at_the_deadline(inference: Inference) -> None:
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        inference.infer("doubler", {"x": X}, parameters={"wait_s": 5.0}, deadline=began + 0.2)
    assert time.monotonic() - began < 2.0


def test_a_cancelled_request_returns_soon_and_stops_the_model(inference: Inference) -> None:
    cancel = threading.Event()
    threading.Timer(0.2, cancel.set).start()
    began = time.monotonic()
    with pytest.raises(RequestCancelled):
        inference.infer("doubler", {"x": X}, parameters={"wait_s": 5.0}, cancelled=cancel.is_set)
    assert inference.infer("doubler", {"x": X})["y"] is not None
    assert time.monotonic() - began < 2.0


def test_closing_a_stream_stops_the_model(inference: Inference) -> None:
    before = observed(inference)[1]
    numbers = np.arange(200, dtype=np.float32)
    pieces = inference.stream("doubler", {"x": numbers}, parameters={"wait_s": 0.01})
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    np.testing.assert_array_equal(inference.infer("doubler", {"x": X})["y"], X * 2)
    assert observed(inference)[1] - before < 100


def test_a_stream_is_cancelled_by_its_flag(inference: Inference) -> None:
    cancel = threading.Event()
    pieces = inference.stream(
        "doubler", {"x": np.arange(500, dtype=np.float32)}, parameters={"wait_s": 0.01}, cancelled=cancel.is_set
    )
    next(pieces)
    cancel.set()
    with pytest.raises(RequestCancelled):
        list(pieces)


def test_a_closed_inference_refuses_calls(inference: Inference) -> None:
    inference.close()
    inference.close()
    with pytest.raises(InferenceUnavailable):
        inference.infer("doubler", {"x": X})
