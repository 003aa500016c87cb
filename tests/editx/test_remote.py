"""`editx --url` and `editx serve`: the same commands, done by a gateway."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import soundfile

from editx.cli.app import run
from tests.fixtures.gateways import Served, serving, wav

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def served(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tiny, tmp_path_factory.mktemp("remote")) as found:
        yield found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.wav"
    path.write_bytes(wav())
    path.with_suffix(".txt").write_text("Well then.")
    return path


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_an_edit_at_a_gateway_leaves_the_same_files_and_report(
    served: Served, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.flac"
    words = ["edit", str(source), "--emotion", "happy", "--iterations", "2", "-o", str(out), "--seed", "7", "--json"]
    assert run(["--url", served.url, *words]) == 0
    told = report(capsys)
    assert (told["seed"], told["checkpoint"], told["output_s"]) == (7, served.url, 1.2)
    assert [step["kind"] for step in told["steps"]] == ["tokenize", "generate", "decode"] * 2
    for path in [out, *map(Path, told["iterations"])]:
        assert soundfile.info(path).frames == 28_800


def test_a_folder_goes_to_a_gateway_and_a_bad_file_does_not_stop_it(
    served: Served, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDITX_URL", served.url)
    (source.parent / "bad.wav").write_bytes(b"no audio")
    assert run(["edit", str(source.parent), "--denoise", "--json"]) == 5
    told = report(capsys)
    assert [Path(one["input"]).name for one in told["failed"]] == ["bad.wav"]
    assert [one["input"] for one in told["done"]] == ["in.wav"]


def test_a_clone_goes_to_a_gateway(
    served: Served, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["clone", str(source), "--text", "New words.", "-o", str(tmp_path / "c.wav"), "--json"]
    assert run(["--url", served.url, *words]) == 0
    assert report(capsys)["edit"] == {"type": "clone", "target_text": "New words."}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["edit", "in.wav", "--emotion", "hapy", "--json"], 2),
        (["tokenize", "in.wav", "--json"], 2),
    ],
)
def test_a_refusal_has_the_exit_code_that_it_has_here(
    served: Served, source: Path, words: list[str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    assert run(["--url", served.url, *words]) == code


def test_a_gateway_that_is_away_is_exit_code_4(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("editx_client.retries.Retries.attempts", 1)
    monkeypatch.setattr("editx_client.client.Retries.wait_s", lambda *_: None)
    assert run(["--url", "http://127.0.0.1:9", "edit", str(source), "--denoise"]) == 4


def test_serve_answers_and_ends_on_a_signal(tiny: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    spans = tmp_path / "spans.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "editx", "serve", "--port", str(port), "--checkpoint", str(tiny), "--cold"],
        cwd=ROOT, stderr=subprocess.PIPE, env={"PATH": "", "EDITX_SPANS_FILE": str(spans)},
    )  # fmt: skip
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            try:
                assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
                break
            except httpx.ConnectError:
                assert process.poll() is None, process.stderr and process.stderr.read().decode()
                assert time.monotonic() < until
                time.sleep(0.1)
        assert httpx.get(f"{url}/readyz").json()["status"] == "ok"
        assert "<html" in httpx.get(url).text
        with httpx.Client(base_url=url, headers={"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}) as client:
            fields = {"type": "denoise", "decode.steps": "1", "seed": "1"}
            answer = client.post("/v1/audio/edits", data=fields, files={"audio": wav()}, timeout=60)
            assert answer.json()["trace_id"] == TRACE
            client.get(answer.headers["location"], headers={"prefer": "wait=50"}, timeout=60)
        assert re.search(r"^editx_http_requests_total", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    finally:
        process.terminate()
        _, told = process.communicate(timeout=30)
    assert process.returncode == 0, told.decode()
    traced = [span for span in map(json.loads, spans.read_text().splitlines()) if span["trace_id"] == TRACE]
    names = {span["name"] for span in traced}
    assert names >= {"POST /v1/audio/edits", "send editx.tokenize", "process editx.tokenize", "process editx.generate"}
