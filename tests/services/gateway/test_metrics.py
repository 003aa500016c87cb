"""What /metrics tells about jobs."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx
import pytest

from services.gateway.metrics import Metrics
from services.gateway.results import ResultsReader
from shared.bus.memory import MemoryBus
from shared.schemas.exchange import RESULTS, Result
from shared.schemas.job import JobError, StepTiming
from shared.tallies import looked_up, passed
from tests.fixtures.gateways import Served, wav

COUNTED = (
    ("editx_batch_passes_total", {"model": "decoder"}),
    ("editx_batch_rows_total", {"model": "decoder"}),
    ("editx_cache_hits_total", {"cache": "prompt tokens"}),
    ("editx_cache_misses_total", {"cache": "prompt tokens"}),
)


def until(condition: Callable[[], bool], patience_s: float = 20.0) -> None:
    end = time.monotonic() + patience_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def result(job_id: str, at: float, **changes: object) -> Result:
    """A job that waited 1 s, was tokenized in 2 s at the second attempt, waited 3 s and generated 80 tokens in 4 s."""
    steps = (
        StepTiming(index=0, kind="tokenize", started_at=at + 1, finished_at=at + 3, attempts=2, metrics={"rtf": 0.5}),
        StepTiming(index=1, kind="generate", started_at=at + 6, finished_at=at + 10, attempts=1,
                   metrics={"rtf": 2.0, "tokens": 80.0}),
    )  # fmt: skip
    facts = {"job_id": job_id, "state": "done", "created_at": at, "finished_at": at + 10, "timings": steps, **changes}
    return Result.model_validate(facts)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_a_result_counts_queue_time_step_time_rtf_tokens_and_retries() -> None:
    metrics = Metrics()
    metrics.count(result("job-1", 100.0))
    assert value(metrics, "editx_jobs_ended_total", state="done") == 1
    assert value(metrics, "editx_job_seconds_sum") == pytest.approx(10.0)
    assert value(metrics, "editx_step_queue_seconds_sum", kind="tokenize") == pytest.approx(1.0)
    assert value(metrics, "editx_step_queue_seconds_sum", kind="generate") == pytest.approx(3.0)
    assert value(metrics, "editx_step_seconds_sum", kind="tokenize") == pytest.approx(2.0)
    assert value(metrics, "editx_rtf_sum", kind="generate") == pytest.approx(2.0)
    assert value(metrics, "editx_tokens_per_second_sum") == pytest.approx(20.0)
    assert value(metrics, "editx_step_retries_total", kind="tokenize") == 1
    assert value(metrics, "editx_dead_letters_total") == 0


def test_a_job_that_was_given_up_counts_as_failed_and_as_a_dead_letter() -> None:
    metrics = Metrics()
    error = JobError(code="gone", message="The model is gone.", hint="", dead_letter=True)
    metrics.count(result("job-1", 100.0, state="failed", error=error, timings=()))
    assert value(metrics, "editx_jobs_ended_total", state="failed") == 1
    assert value(metrics, "editx_dead_letters_total") == 1
    assert value(metrics, "editx_job_seconds_count") == 0


def test_a_result_told_twice_counts_once_and_older_or_strange_ones_not_at_all(served: Served) -> None:
    bus, metrics = MemoryBus(), Metrics()
    now = time.time()
    reader = ResultsReader(bus, metrics, served.gateway.webhooks)
    told = [result("begun", now, state="accepted"), result("old", now - 3_600), *[result("new", now)] * 2]
    for found in (*told, result("last", now)):
        bus.publish(RESULTS, found.job_id, found.model_dump_json().encode())
        bus.publish(RESULTS, found.job_id, b"not a result")
    reader.start()
    try:
        until(lambda: value(metrics, "editx_jobs_ended_total", state="done") == 2)
    finally:
        reader.stop()
    assert value(metrics, "editx_step_seconds_count", kind="tokenize") == 2


def test_a_defect_in_counting_one_result_does_not_end_the_reading(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(found: Result) -> None:
        if found.job_id == "odd":
            raise KeyError("nobody foresaw this")
        count(found)

    bus, metrics, now = MemoryBus(), Metrics(), time.time()
    count = metrics.count
    monkeypatch.setattr(metrics, "count", odd)
    reader = ResultsReader(bus, metrics, served.gateway.webhooks)
    reader.start()
    for found in (result("odd", now), result("good", now)):
        bus.publish(RESULTS, found.job_id, found.model_dump_json().encode())
    try:
        until(lambda: value(metrics, "editx_jobs_ended_total", state="done") == 1)
    finally:
        reader.stop()


def test_metrics_tell_the_batches_and_cache_hits_of_models_in_this_process() -> None:
    metrics = Metrics()
    before = [value(metrics, name, **labels) or 0.0 for name, labels in COUNTED]
    passed("decoder", 1)
    passed("decoder", 4)
    looked_up("prompt tokens", hits=96, misses=32)
    after = [value(metrics, name, **labels) or 0.0 for name, labels in COUNTED]
    assert [late - early for early, late in zip(before, after, strict=True)] == [2, 5, 96, 32]


def test_a_job_that_came_twice_is_a_cache_hit(client: httpx.Client) -> None:
    metrics, body = Metrics(), {"audio": ("a.wav", wav(), "audio/wav")}
    before = [value(metrics, f"editx_cache_{what}_total", cache="jobs") or 0.0 for what in ("hits", "misses")]
    for _ in range(3):
        client.post(
            "/v1/audio/edits", files=body, data={"type": "denoise"}, headers={"idempotency-key": "metrics-1"}
        ).raise_for_status()
    after = [value(metrics, f"editx_cache_{what}_total", cache="jobs") or 0.0 for what in ("hits", "misses")]
    assert [late - early for early, late in zip(before, after, strict=True)] == [2, 1]


def test_metrics_tell_of_a_job_that_came_over_http(client: httpx.Client) -> None:
    answer = client.post(
        "/v1/audio/edits",
        files={"audio": ("a.wav", wav(), "audio/wav")},
        data={"type": "emotion", "detail": "happy", "text": "Hello."},
        headers={"prefer": "wait=20"},
    )
    assert answer.status_code == 200, answer.text
    until(lambda: 'editx_step_seconds_count{kind="decode"}' in client.get("/metrics").text)
    text = client.get("/metrics").text
    assert 'editx_rtf_count{kind="generate"}' in text
    assert "editx_first_audio_seconds_bucket" in text
