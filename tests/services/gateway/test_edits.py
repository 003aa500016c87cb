"""An edit over HTTP, from upload to audio."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import soundfile

from shared.schemas.route import DLQ_UNREADABLE
from tests.fixtures.gateways import Served, events, serving, wav

HAPPY = {"type": "emotion", "detail": "happy", "text": "Well then."}


def edit(client: httpx.Client, headers: dict[str, str] | None = None, **values: Any) -> httpx.Response:
    files = {"audio": ("in.wav", wav(), "audio/wav")}
    return client.post("/v1/audio/edits", data={**HAPPY, **values}, files=files, headers=headers or {})


def finished(client: httpx.Client, **values: Any) -> dict[str, Any]:
    answer = edit(client, {"prefer": "wait=20"}, **values)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_form_with_a_recording_becomes_a_job_that_ends_with_audio(client: httpx.Client) -> None:
    answer = edit(client)
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    job = client.get(answer.headers["location"], headers={"prefer": "wait=20"}).json()
    assert job["status"] == "done"
    assert job["edit"] == {"type": "emotion", "detail": "happy", "target_text": None}
    audio = client.get(job["audio"][0]["href"])
    assert audio.headers["content-type"] == "audio/wav"
    samples, rate = soundfile.read(io.BytesIO(audio.content))
    assert rate == 24_000
    assert len(samples) == 28_800
    assert httpx.get(job["audio"][0]["url"]).content == audio.content


def test_prefer_wait_answers_a_short_job_in_one_call(client: httpx.Client) -> None:
    answer = edit(client, {"prefer": "respond-async, wait=20"})
    assert answer.status_code == 200
    assert answer.headers["preference-applied"] == "wait=20"
    assert answer.json()["status"] == "done"


def test_json_takes_the_recording_in_base64(client: httpx.Client) -> None:
    body = {**HAPPY, "audio": base64.b64encode(wav()).decode(), "generate": {"top_k": 5}}
    assert client.post("/v1/audio/edits", json=body, headers={"prefer": "wait=20"}).json()["status"] == "done"


def test_an_upload_is_put_to_its_url_and_named_by_its_id(client: httpx.Client) -> None:
    upload = client.post("/v1/uploads", json={"bytes": len(wav())}).json()
    assert httpx.put(upload["url"], content=wav()).status_code == 200
    job = client.post("/v1/audio/edits", json={**HAPPY, "upload_id": upload["id"]}, headers={"prefer": "wait=20"})
    assert job.json()["status"] == "done"


def test_an_upload_that_was_never_put_is_a_404(client: httpx.Client) -> None:
    upload = client.post("/v1/uploads").json()
    answer = client.post("/v1/audio/edits", json={**HAPPY, "upload_id": upload["id"]})
    assert (answer.status_code, answer.json()["code"]) == (404, "upload_not_found")


def test_a_presigned_url_is_good_for_its_own_key_and_method_only(client: httpx.Client) -> None:
    first, second = (client.post("/v1/uploads").json()["url"] for _ in range(2))
    mixed = second.split("?")[0] + "?" + first.split("?")[1]
    assert httpx.put(mixed, content=b"x").status_code == 403
    assert httpx.get(first).status_code == 403
    assert httpx.put(first.split("?")[0], content=b"x").status_code == 403


def test_every_iteration_can_be_heard_and_so_can_the_source(client: httpx.Client) -> None:
    job = finished(client, iterations="2", format="flac")
    assert [(one["iteration"], one["format"]) for one in job["audio"]] == [(1, "wav"), (2, "flac")]
    assert [step["kind"] for step in job["steps"]] == ["tokenize", "generate", "decode"] * 2
    path = f"/v1/jobs/{job['id']}/audio"
    assert client.get(path).headers["content-type"] == "audio/flac"
    assert client.get(path, params={"iteration": 0}).content == wav()
    answer = client.get(path, params={"iteration": 3})
    assert (answer.status_code, answer.json()["code"]) == (404, "audio_not_ready")


def test_audio_comes_whole_in_part_or_not_again(client: httpx.Client) -> None:
    path = f"/v1/jobs/{finished(client)['id']}/audio"
    whole, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == whole.headers["content-length"] == str(len(whole.content))
    part = client.get(path, headers={"range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, whole.content[4:8])
    assert part.headers["content-range"] == f"bytes 4-7/{len(whole.content)}"
    assert client.get(path, headers={"if-none-match": whole.headers["etag"]}).status_code == 304


def test_events_tell_the_whole_way_and_the_last_one_carries_the_job(client: httpx.Client) -> None:
    job = finished(client)
    answer = client.get(f"/v1/jobs/{job['id']}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    told = events(answer.text)
    assert [number for number, _, _ in told] == [str(number) for number in range(1, len(told) + 1)]
    assert told[0][1] == "job.accepted"
    assert told[-1][1] == "job.done"
    assert json.loads(told[-1][2])["job"]["id"] == job["id"]


def test_events_resume_after_the_last_one_seen(client: httpx.Client) -> None:
    path = f"/v1/jobs/{finished(client)['id']}/events"

    def numbers(**settings: Any) -> list[str]:
        return [number for number, _, _ in events(client.get(path, **settings).text)]

    everything = numbers()
    assert numbers(headers={"last-event-id": "2"}) == everything[2:]
    over = client.get(path, headers={"last-event-id": str(everything[-1])})
    assert (over.status_code, over.content) == (204, b"")
    assert numbers(params={"after": 3}) == everything[3:]
    assert client.get(path, headers={"last-event-id": "two"}).status_code == 400


def test_events_come_while_the_job_runs(served: Served, client: httpx.Client) -> None:
    served.llm.gate.clear()
    try:
        job = edit(client).json()
        with client.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
            seen = []
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    seen.append(line.removeprefix("event: "))
                    if seen.count("job.started") == 2:
                        served.llm.gate.set()
        assert seen[-1] == "job.done"
    finally:
        served.llm.gate.set()


def test_a_silent_stream_of_events_says_that_it_is_alive(tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, tmp_path, heartbeat_s=0.1) as served, served.client() as client:
        served.llm.gate.clear()
        job = edit(client).json()
        with client.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
            assert any(line == ": alive" for line in answer.iter_lines())
        served.llm.gate.set()


def test_a_listener_that_leaves_gives_its_place_back(tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, tmp_path, listeners_max=1) as served, served.client() as client:
        served.llm.gate.clear()
        path = f"/v1/jobs/{edit(client).json()['id']}/events"
        with client.stream("GET", path) as answer:
            lines = answer.iter_lines()
            assert next(lines)
            with served.client() as other:
                assert other.get(path).status_code == 429
        until = time.monotonic() + 10
        while served.gateway.listeners.count and time.monotonic() < until:
            time.sleep(0.05)
        assert served.gateway.listeners.count == 0
        served.llm.gate.set()


def test_a_running_job_can_be_cancelled_and_its_model_stops(served: Served, client: httpx.Client) -> None:
    served.llm.gate.clear()
    try:
        stopped = served.llm.cancelled
        job = edit(client).json()
        assert client.post(f"/v1/jobs/{job['id']}/cancel").status_code == 200
        job = client.get(f"/v1/jobs/{job['id']}", headers={"prefer": "wait=10"}).json()
        assert job["status"] == "cancelled"
        assert served.llm.cancelled in (stopped, stopped + 1)
    finally:
        served.llm.gate.set()
    assert client.post(f"/v1/jobs/{job['id']}/cancel").status_code == 200


def test_a_job_that_is_done_cannot_be_cancelled(client: httpx.Client) -> None:
    answer = client.post(f"/v1/jobs/{finished(client)['id']}/cancel")
    assert (answer.status_code, answer.json()["code"]) == (409, "job_closed")


def test_deleting_a_job_deletes_its_artifacts(served: Served, client: httpx.Client) -> None:
    job = finished(client)
    assert list(served.system.store.list(f"jobs/{job['id']}/"))
    assert client.delete(f"/v1/jobs/{job['id']}").status_code == 204
    assert not list(served.system.store.list(f"jobs/{job['id']}/"))
    assert client.get(f"/v1/jobs/{job['id']}").status_code == 404
    assert httpx.get(job["audio"][0]["url"]).status_code == 404
    assert client.delete(f"/v1/jobs/{job['id']}").status_code == 404


def test_deleting_a_job_that_waits_leaves_no_dead_letter(served: Served, client: httpx.Client) -> None:
    served.llm.gate.clear()
    try:
        waiting = [edit(client).json()["id"] for _ in range(8)]
        assert {client.delete(f"/v1/jobs/{job_id}").status_code for job_id in waiting} == {204}
        assert not {job["id"] for job in client.get("/v1/jobs").json()["data"]} & set(waiting)
    finally:
        served.llm.gate.set()
    assert finished(client)["status"] == "done"
    assert served.system.bus.backlog(DLQ_UNREADABLE, "nobody") == 0


def test_jobs_are_listed_newest_first_in_pages(client: httpx.Client) -> None:
    made = [finished(client)["id"] for _ in range(3)]
    first = client.get("/v1/jobs", params={"limit": 2}).json()
    assert [job["id"] for job in first["data"]] == made[:0:-1]
    second = client.get("/v1/jobs", params={"limit": 1, "cursor": first["next_cursor"], "status": "done"}).json()
    assert second["data"][0]["id"] == made[0]


def test_a_batch_is_many_jobs_under_one_id(client: httpx.Client) -> None:
    audio = base64.b64encode(wav()).decode()
    answer = client.post(
        "/v1/batches", json={"edits": [{**HAPPY, "audio": audio}, {"type": "denoise", "audio": audio}]}
    )
    assert answer.status_code == 202, answer.text
    batch = answer.json()
    for job_id in batch["jobs"]:
        job = client.get(f"/v1/jobs/{job_id}", headers={"prefer": "wait=20"}).json()
        assert (job["status"], job["lane"]) == ("done", "batch")
    batch = client.get(f"/v1/batches/{batch['id']}").json()
    assert (batch["status"], batch["counts"]) == ("done", {"done": 2})
    assert client.post(f"/v1/batches/{batch['id']}/cancel").json()["counts"] == {"done": 2}
    assert client.delete(f"/v1/batches/{batch['id']}").status_code == 204
    assert client.get(f"/v1/batches/{batch['id']}").status_code == 404
    assert client.get(f"/v1/jobs/{batch['jobs'][0]}").status_code == 404


def test_uploads_and_batches_go_when_their_time_is_over(served: Served) -> None:
    store, settings = served.system.store, served.gateway.settings
    for key in ("uploads/local/upl_1", "batches/local/batch_1.json", "voices/local/voice_1/voice.json"):
        store.put(key, b"{}")
    served.gateway.tidy()
    assert store.get("batches/local/batch_1.json") == b"{}"
    over = settings.model_copy(update={"upload_keep_s": -1.0, "job_keep_s": -1.0})
    replace(served.gateway, settings=over).tidy()
    assert [info.key for prefix in ("uploads/", "batches/") for info in store.list(prefix)] == []
    assert store.get("voices/local/voice_1/voice.json") == b"{}"
    store.delete("voices/local/voice_1/voice.json")


def test_a_batch_with_one_bad_edit_makes_no_job(client: httpx.Client) -> None:
    audio = base64.b64encode(wav()).decode()
    newest = client.get("/v1/jobs", params={"limit": 1}).json()["data"][0]["id"]
    edits = [{**HAPPY, "audio": audio}, {"type": "emotion", "detail": "happpy", "text": "x", "audio": audio}]
    answer = client.post("/v1/batches", json={"edits": edits})
    assert (answer.status_code, answer.json()["code"]) == (400, "unknown_tag")
    assert "happy" in answer.json()["hint"]
    assert client.get("/v1/jobs", params={"limit": 1}).json()["data"][0]["id"] == newest


def test_the_same_idempotency_key_and_body_give_the_same_job(client: httpx.Client) -> None:
    first, second = (edit(client, {"idempotency-key": '"same-1"'}) for _ in range(2))
    assert first.json()["id"] == second.json()["id"]
    assert "idempotency-replayed" not in first.headers
    assert second.headers["idempotency-replayed"] == "true"


def test_the_same_idempotency_key_with_another_body_is_a_422(client: httpx.Client) -> None:
    edit(client, {"idempotency-key": "same-2"})
    answer = edit(client, {"idempotency-key": "same-2"}, detail="sad")
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_conflict")
    assert edit(client, {"idempotency-key": "with space"}).status_code == 400


def test_the_same_idempotency_key_at_the_same_time_is_a_409(served: Served, client: httpx.Client) -> None:
    entered, leave = threading.Event(), threading.Event()
    receive = served.gateway.recordings.receive

    def slowly(*args: Any) -> Any:
        entered.set()
        assert leave.wait(10)
        return receive(*args)

    answers: list[httpx.Response] = []
    with pytest.MonkeyPatch.context() as patch, served.client() as other:
        patch.setattr(served.gateway.recordings, "receive", slowly)
        first = threading.Thread(target=lambda: answers.append(edit(other, {"idempotency-key": "same-3"})))
        first.start()
        assert entered.wait(10)
        refused = edit(client, {"idempotency-key": "same-3"})
        leave.set()
        first.join()
    assert (refused.status_code, refused.json()["code"]) == (409, "idempotency_in_progress")
    assert answers[0].status_code == 202


def test_a_batch_sent_again_with_its_key_is_the_same_batch(client: httpx.Client) -> None:
    edits = {"edits": [{**HAPPY, "audio": base64.b64encode(wav()).decode()}]}
    headers = {"idempotency-key": "batch-1"}
    first, second = (client.post("/v1/batches", json=edits, headers=headers).json() for _ in range(2))
    assert (first["id"], first["jobs"]) == (second["id"], second["jobs"])
    edits["edits"][0]["detail"] = "sad"
    assert client.post("/v1/batches", json=edits, headers=headers).status_code == 422


def test_a_checkpoint_that_was_not_trained_on_an_edit_says_so(client: httpx.Client) -> None:
    assert "not trained on emotion confusion" in finished(client, detail="confusion")["warnings"][0]
    sound = finished(client, type="paralinguistic", detail="", target_text="You know [cough], I did.")
    assert "not trained on [cough]" in sound["warnings"][0]
    assert finished(client)["warnings"] == []
