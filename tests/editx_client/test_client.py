"""The Python client against a real gateway, and against one that fails in chosen ways."""

from __future__ import annotations

import ast
import asyncio
import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import soundfile

import editx_client
from editx_client import ApiError, AsyncClient, Client, ClientError, Event, JobFailed, Retries, Unreachable
from tests.fixtures.gateways import Served, serving, wav

PACKAGE = Path(editx_client.__file__).parent
HAPPY: dict[str, Any] = {"type": "emotion", "detail": "happy", "text": "Well then."}
CONSENT = {"consent_statement": "I agree.", "consent_by": "Ada"}
QUICK = Retries(attempts=3, base_s=0.001)


@pytest.fixture(scope="module")
def served(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tiny, tmp_path_factory.mktemp("client")) as found:
        yield found


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.url) as found:
        yield found


def answering(*answers: httpx.Response | Exception) -> tuple[Client, list[httpx.Request]]:
    """A client of a gateway that gives these answers in turn, and the requests that it got."""
    requests: list[httpx.Request] = []
    waiting = list(answers)

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        answer = waiting.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return Client("http://gateway", retries=QUICK, transport=httpx.MockTransport(handle)), requests


def job(status: str = "accepted") -> httpx.Response:
    return httpx.Response(202, json={"id": "job_1", "status": status, "progress": 0.0, "new_field": 1})


def test_an_edit_tells_its_progress_and_comes_back_with_audio(client: Client, tmp_path: Path) -> None:
    told: list[Event] = []
    (tmp_path / "in.wav").write_bytes(wav())
    done = client.edit(tmp_path / "in.wav", **HAPPY, iterations=2, generate={"top_k": 3}, on_event=told.append)
    assert done.status == "done"
    assert [one.iteration for one in done.audio] == [1, 2]
    assert [event.seq for event in told] == list(range(1, len(told) + 1))
    assert told[-1].progress == 1.0
    samples, rate = soundfile.read(client.save(done, tmp_path / "out.wav"))
    assert (len(samples), rate) == (28_800, 24_000)
    assert client.audio(done.id, 0) == wav()


def test_jobs_can_be_listed_looked_at_and_deleted(client: Client) -> None:
    made = client.submit(io.BytesIO(wav()), type="denoise")
    assert client.job(made.id, wait_s=10).status == "done"
    assert client.jobs(limit=1, status=["done"]).data[0].id == made.id
    client.delete(made.id)
    with pytest.raises(ApiError) as refused:
        client.job(made.id)
    assert (refused.value.status, refused.value.code) == (404, "job_not_found")
    assert refused.value.request_id


def test_a_running_job_can_be_cancelled(served: Served, client: Client) -> None:
    served.llm.gate.clear()
    try:
        made = client.submit(wav(), type="denoise")
        client.cancel(made.id)
        with pytest.raises(JobFailed) as ended:
            client.wait(made.id)
    finally:
        served.llm.gate.set()
    assert ended.value.job.status == "cancelled"


def test_waiting_has_an_end(served: Served, client: Client) -> None:
    served.llm.gate.clear()
    try:
        made = client.submit(wav(), type="denoise")
        with pytest.raises(TimeoutError):
            client.wait(made.id, timeout_s=0.0)
    finally:
        served.llm.gate.set()
        client.wait(made.id)


def test_uploads_batches_voices_and_speech(client: Client) -> None:
    upload = client.upload(wav())
    batch = client.submit_batch([{"type": "denoise", "upload_id": upload.id}] * 2)
    for job_id in batch.jobs:
        client.wait(job_id)
    assert client.batch(batch.id).counts == {"done": 2}
    assert client.cancel_batch(batch.id).counts == {"done": 2}
    client.delete_batch(batch.id)
    with pytest.raises(ApiError, match="batch"):
        client.batch(batch.id)
    voice = client.add_voice("Ada", wav(2.0), "What she says.", **CONSENT)
    assert client.voices() == [voice]
    assert client.edit(type="clone", target_text="New words.", voice="Ada").text == "What she says."
    whole = client.speech("Hello.", model="tiny", voice="Ada", response_format="pcm", seed=1)
    pieces = list(client.stream_speech("Hello.", model="tiny", voice=voice.id, response_format="pcm", seed=1))
    assert len(whole) == 2 * 28_800
    assert b"".join(pieces) == whole
    spoken = client.speech("Hello.", model="tiny", reference=wav(), reference_text="x", response_format="pcm", seed=1)
    assert spoken == whole
    client.remove_voice("Ada")
    assert client.voices() == []
    assert client.models()[0]["id"] == "tiny"
    assert {edit["type"] for edit in client.options()["edits"]} >= {"emotion", "clone"}


def test_the_asynchronous_client_does_the_same(served: Served) -> None:
    async def everything() -> None:
        told: list[Event] = []

        async def tell(event: Event) -> None:
            told.append(event)

        async with AsyncClient(served.url) as client:
            jobs = await asyncio.gather(*(client.edit(wav(), type="denoise", on_event=tell) for _ in range(3)))
            assert {job.status for job in jobs} == {"done"}
            assert len(await client.audio(jobs[0])) > 1000
            assert [event.type for event in told].count("done") == 3
            upload = await client.upload(wav())
            await client.edit(type="denoise", upload_id=upload.id)
            voice = await client.add_voice("Bob", wav(2.0), "What he says.", **CONSENT)
            spoken = [piece async for piece in client.stream_speech("Hi.", model="tiny", voice=voice.id)]
            assert b"".join(spoken)
            await client.remove_voice("Bob")
            with pytest.raises(ApiError):
                await client.job("job_none")

    asyncio.run(everything())


def test_a_refusal_for_now_is_asked_again_with_the_same_idempotency_key() -> None:
    busy = httpx.Response(429, headers={"retry-after": "0"}, json={"code": "overloaded"})
    client, requests = answering(httpx.ConnectError("refused"), busy, job())
    assert client.submit(wav(), type="denoise").id == "job_1"
    assert len({request.headers["idempotency-key"] for request in requests}) == 1
    assert len(requests) == 3


def test_a_refusal_for_good_is_raised_at_once() -> None:
    document = {"code": "unknown_tag", "detail": "No such tag.", "hint": "Did you mean happy?"}
    client, requests = answering(httpx.Response(400, json=document))
    with pytest.raises(ApiError, match="Did you mean happy") as refused:
        client.submit(wav(), **{**HAPPY, "detail": "hapy"})
    assert (refused.value.code, len(requests)) == ("unknown_tag", 1)


def test_a_long_wait_that_the_gateway_wishes_is_not_waited() -> None:
    client, requests = answering(httpx.Response(503, headers={"retry-after": "3600"}))
    with pytest.raises(ApiError) as refused:
        client.models()
    assert (refused.value.retry_after_s, len(requests)) == (3600.0, 1)


def test_a_gateway_that_is_away_is_unreachable() -> None:
    client, requests = answering(*[httpx.ConnectError("refused")] * 3)
    with pytest.raises(Unreachable, match="refused"):
        client.models()
    assert len(requests) == 3


def test_what_must_not_be_done_twice_is_not_asked_twice() -> None:
    client, requests = answering(httpx.ReadTimeout("late"))
    with pytest.raises(Unreachable):
        client.add_voice("Ada", wav(), "Words.", **CONSENT)
    assert len(requests) == 1


def test_events_go_on_where_a_broken_connection_left_them() -> None:
    def event(seq: int, name: str, job: str = "null") -> str:
        state = "done" if name == "done" else "running"
        return (
            f'id: {seq}\nevent: job.{name}\ndata: {{"seq": {seq}, "job_id": "job_1", "at": 0, "type": "{name}",'
            f' "state": "{state}", "step_index": 0, "progress": 0.5, "job": {job}}}\n\n'
        )

    class Broken(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield (event(1, "accepted") + ": alive\n\n" + event(2, "started")).encode()
            raise httpx.ReadError("gone")

    rest = event(3, "done", '{"id": "job_1", "status": "done", "progress": 1.0}')
    client, requests = answering(httpx.Response(200, stream=Broken()), httpx.Response(200, text=rest))
    assert [event.seq for event in client.events("job_1")] == [1, 2, 3]
    assert [request.headers["last-event-id"] for request in requests] == ["0", "2"]


def test_the_key_goes_to_the_gateway_and_not_to_the_store() -> None:
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        upload = {"id": "upl_1", "url": "http://store/x", "url_expires_at": 0, "expires_at": 0, "max_bytes": 1}
        return httpx.Response(200, json=upload)

    with Client("http://gateway", api_key="secret", transport=httpx.MockTransport(handle)) as client:
        client.upload(b"x")
    assert [request.headers.get("authorization") for request in seen] == ["Bearer secret", None]


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]"])
def test_an_answer_that_is_no_problem_document_is_still_an_error(body: bytes) -> None:
    client, _ = answering(httpx.Response(404, content=body))
    with pytest.raises(ApiError, match="404"):
        client.models()


def test_the_package_imports_httpx_and_the_standard_library_only() -> None:
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                assert top in {"httpx", "editx_client"} or top in sys.stdlib_module_names, f"{path.name}: {name}"


def test_the_package_installs_alone_and_brings_its_types(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    offline = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "install", *offline, "--target", target, source], check=True)
    assert (target / "editx_client" / "py.typed").is_file()
    look = f"import sys; sys.path.insert(0, {str(target)!r}); import editx_client; print(editx_client.__file__)"
    found = subprocess.run([sys.executable, "-c", look], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(target))


def test_both_clients_offer_the_same_methods() -> None:
    def public(kind: type) -> set[str]:
        return {name for name, value in vars(kind).items() if isinstance(value, Callable) and name[0] != "_"}

    assert public(Client) == public(AsyncClient)
    assert issubclass(JobFailed, ClientError)
