"""Request ids, metrics, health, and problems in one form everywhere."""

from __future__ import annotations

import logging
from pathlib import Path

import httpx
import pytest

from shared.bus.port import BusUnavailable
from shared.jobs.port import JobStoreUnavailable
from tests.fixtures.gateways import Served, serving, wav


def test_a_request_keeps_its_own_id_where_it_looks_like_one(client: httpx.Client) -> None:
    assert client.get("/healthz", headers={"x-request-id": "my-id-12345"}).headers["x-request-id"] == "my-id-12345"
    for strange in ("short", "with space inside", "x" * 200, "<script>alert</script>"):
        found = client.get("/healthz", headers={"x-request-id": strange}).headers["x-request-id"]
        assert found.startswith("req_")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("PATCH", "/v1/jobs", 405)])
def test_what_is_not_there_is_a_problem_document_too(client: httpx.Client, method: str, path: str, status: int) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["instance"] == path
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_metrics_count_requests_by_route_and_never_by_path(client: httpx.Client) -> None:
    client.get("/v1/jobs/job_of_nobody")
    text = client.get("/metrics").text
    assert 'editx_http_requests_total{method="GET",route="/v1/jobs/{job_id}",status="404"}' in text
    assert "job_of_nobody" not in text
    assert "editx_backlog_steps" in text


def test_readiness_names_what_does_not_answer(
    served: Served, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.get("/readyz").json()["status"] == "ok"

    def away() -> None:
        raise BusUnavailable("The broker is away.")

    monkeypatch.setattr(served.system.bus, "ping", away)
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["bus"], answer.json()["jobs"]) == (503, "The broker is away.", "ok")
    assert client.get("/healthz").status_code == 200


def test_models_that_are_away_do_not_keep_the_gateway_from_taking_jobs(
    served: Served, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.system.inference, "ready", lambda _: False)
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["llm"]) == (200, "not ready")


def test_a_store_that_is_away_is_a_503_with_the_time_to_come_again(
    served: Served, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise JobStoreUnavailable("The job store is away.")

    monkeypatch.setattr(served.system.jobs, "list", away)
    answer = client.get("/v1/jobs")
    assert (answer.status_code, answer.json()["code"]) == (503, "job_store_unavailable")
    assert int(answer.headers["retry-after"]) >= 1


def test_a_defect_is_a_500_that_tells_nothing_of_the_inside(
    served: Served, client: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(served.system.jobs, "list", broken)
    with caplog.at_level(logging.ERROR):
        answer = client.get("/v1/jobs")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
    assert "a secret of the inside" in caplog.text
    assert answer.json()["request_id"]


def test_a_job_that_cannot_be_published_now_is_accepted_and_done_later(tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, tmp_path) as served, served.client() as client:
        publish = served.system.bus.publish

        def away(*_: object, **__: object) -> None:
            raise BusUnavailable("The broker is away.")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(served.system.bus, "publish", away)
            answer = client.post("/v1/audio/edits", data={"type": "denoise"}, files={"audio": wav()})
            assert answer.status_code == 202
        assert served.system.bus.publish == publish
        served.system._sweeper.sweep(everything=True)
        path = f"/v1/jobs/{answer.json()['id']}"
        assert client.get(path, headers={"prefer": "wait=10"}).json()["status"] == "done"
