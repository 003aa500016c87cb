"""Keys, quotas, lanes, load and ownership."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.gateway.access import Admission, Principal
from services.gateway.metrics import Metrics
from services.gateway.problems import TooMuch
from services.gateway.settings import GatewaySettings
from shared.errors import UserError
from shared.jobs.quota import MemoryQuota
from tests.fixtures.gateways import Served, serving, wav

HAPPY = {"type": "emotion", "detail": "happy", "text": "Well then."}


def key(name: str, **limits: Any) -> dict[str, Any]:
    return {"id": name, "sha256": hashlib.sha256(f"secret-of-{name}".encode()).hexdigest(), **limits}


@pytest.fixture(scope="module")
def guarded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("guarded")
    keys = [key("ada"), key("bob", open_jobs_max=1, lanes=["interactive"]), key("eve", requests_per_minute=2)]
    (folder / "keys.json").write_text(json.dumps(keys))
    with serving(tiny, folder, api_keys_file=folder / "keys.json", backlog_batch_max=0) as found:
        yield found


@pytest.fixture
def as_user(guarded: Served) -> Iterator[Callable[[str], httpx.Client]]:
    made: list[httpx.Client] = []

    def client(name: str) -> httpx.Client:
        made.append(guarded.client(headers={"authorization": f"Bearer secret-of-{name}"}))
        return made[-1]

    yield client
    for one in made:
        one.close()


def edit(client: httpx.Client, **values: str) -> httpx.Response:
    return client.post("/v1/audio/edits", data={**HAPPY, **values}, files={"audio": wav()})


def test_without_a_key_nothing_is_told(guarded: Served) -> None:
    with guarded.client() as client:
        answer = client.get("/v1/jobs")
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert client.get("/v1/jobs", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/healthz").status_code == 200


def test_a_key_may_come_in_either_header(guarded: Served, as_user: Callable[[str], httpx.Client]) -> None:
    with guarded.client() as client:
        assert client.get("/v1/jobs", headers={"x-api-key": "secret-of-ada"}).status_code == 200
    assert as_user("ada").get("/v1/jobs").status_code == 200


def test_jobs_voices_and_uploads_of_others_are_not_there(as_user: Callable[[str], httpx.Client]) -> None:
    ada, bob = as_user("ada"), as_user("bob")
    job = edit(ada).json()["id"]
    for path in (f"/v1/jobs/{job}", f"/v1/jobs/{job}/events", f"/v1/jobs/{job}/audio"):
        assert bob.get(path).status_code == 404
    assert bob.post(f"/v1/jobs/{job}/cancel").status_code == 404
    assert bob.delete(f"/v1/jobs/{job}").status_code == 404
    assert bob.get("/v1/jobs").json()["data"] == []
    upload = ada.post("/v1/uploads").json()
    httpx.put(upload["url"], content=wav())
    assert bob.post("/v1/audio/edits", json={**HAPPY, "upload_id": upload["id"]}).status_code == 404


def test_a_lane_that_a_key_lacks_is_forbidden(as_user: Callable[[str], httpx.Client]) -> None:
    answer = edit(as_user("bob"), lane="batch")
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")


def test_a_full_lane_refuses_with_the_time_to_come_again(as_user: Callable[[str], httpx.Client]) -> None:
    answer = edit(as_user("ada"), lane="batch")
    assert (answer.status_code, answer.json()["code"]) == (429, "overloaded")
    assert int(answer.headers["retry-after"]) >= 1


def test_the_backlog_is_read_from_the_bus_and_holds_new_jobs_off(tiny: Path, tmp_path: Path) -> None:
    settings = {"backlog_interactive_max": 3, "backlog_every_s": 60.0}
    with serving(tiny, tmp_path, **settings) as served, served.client() as client:
        served.llm.gate.clear()
        assert [edit(client).status_code for _ in range(4)] == [202, 202, 202, 429]
        served.gateway.admission.look()
        assert served.gateway.admission.backlog("interactive") >= 3
        assert edit(client).status_code == 429
        served.llm.gate.set()
        for job in client.get("/v1/jobs").json()["data"]:
            client.get(f"/v1/jobs/{job['id']}", headers={"prefer": "wait=20"})
        until = time.monotonic() + 10
        while served.gateway.admission.backlog("interactive") and time.monotonic() < until:
            time.sleep(0.05)  # a worker commits a moment after its job has ended
            served.gateway.admission.look()
        assert edit(client).status_code == 202


def test_open_jobs_are_counted_per_key(guarded: Served, as_user: Callable[[str], httpx.Client]) -> None:
    guarded.llm.gate.clear()
    try:
        bob = as_user("bob")
        assert edit(bob).status_code == 202
        answer = edit(bob)
        assert (answer.status_code, answer.json()["code"]) == (429, "too_many_jobs")
        assert int(answer.headers["retry-after"]) >= 1
        one = {**HAPPY, "audio": base64.b64encode(wav()).decode(), "lane": "interactive"}
        answer = bob.post("/v1/batches", json={"edits": [one, one]})
        assert (answer.status_code, answer.json()["code"]) == (429, "too_many_jobs")
        open_jobs = [job["id"] for job in bob.get("/v1/jobs").json()["data"] if job["finished_at"] is None]
        assert len(open_jobs) == 1
        assert edit(as_user("ada")).status_code == 202
    finally:
        guarded.llm.gate.set()


def test_calls_are_counted_per_key(as_user: Callable[[str], httpx.Client]) -> None:
    eve = as_user("eve")
    assert [eve.post("/v1/uploads").status_code for _ in range(3)] == [201, 201, 429]
    answer = eve.post("/v1/uploads")
    assert answer.json()["code"] == "rate_limited"
    assert 1 <= int(answer.headers["retry-after"]) <= 30
    assert eve.get("/v1/jobs").status_code == 200


def test_a_rate_refills_with_time_and_is_one_for_all_gateways_of_a_job_store(guarded: Served) -> None:
    now = [0.0]
    backend = replace(guarded.gateway.backend, quota=MemoryQuota(clock=lambda: now[0]))
    here, there = (Admission(backend, GatewaySettings(), Metrics()) for _ in range(2))
    eve = Principal("eve", 2, 1, ("interactive",), None)
    here.call(eve)
    there.call(eve)
    with pytest.raises(TooMuch) as refused:
        here.call(eve)
    now[0] += refused.value.retry_after_s
    there.call(eve)


def test_a_keys_file_that_is_damaged_or_ambiguous_is_refused(tiny: Path, tmp_path: Path) -> None:
    for content in ("{}", json.dumps([key("ada"), key("ada")]), json.dumps([key("local")])):
        (tmp_path / "keys.json").write_text(content)
        with pytest.raises(UserError), serving(tiny, tmp_path, api_keys_file=tmp_path / "keys.json"):
            pass
