import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from editx.cli.app import run as run_command_line
from editx.cli.checkpoint import app

GOLDEN = Path(__file__).parents[2] / "data" / "golden"


def run(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


def test_info_says_where_the_parts_are_and_what_was_trained(tiny: Path) -> None:
    text = run("info", tiny)
    assert "emotion (happy, sad, angry)" in text
    assert "flow.pt" in text
    document = json.loads(run("info", tiny, "--json"))
    assert document["metadata"]["name"] == "tiny"
    assert document["components"]["flow"]["bytes"] > 0


def test_info_of_a_release_that_does_not_say_lists_the_published_edits(tiny: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tiny, tmp_path / "c")
    (root / "editx.json").unlink()
    text = run("info", root)
    assert "not stated" in text
    for tag in ("admiration", "ethereal", "more slower", "clears throat", "Sichuanese", "denoise"):
        assert tag in text.replace("\n", " ")


def test_info_of_an_incomplete_checkpoint_names_what_is_missing(tiny: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tiny, tmp_path / "c")
    next(root.rglob("flow.pt")).unlink()
    assert "flow.safetensors or flow.pt" in run("info", root)


def test_verify_accepts_a_whole_checkpoint_and_fails_for_a_damaged_one(tiny: Path, tmp_path: Path) -> None:
    assert "problem" not in run("verify", tiny)
    assert json.loads(run("verify", tiny, "--json"))["ok"] is True
    root = shutil.copytree(tiny, tmp_path / "c")
    next(root.rglob("hift.pt")).write_bytes(b"damaged")
    assert "vocoder: wrong" in run("verify", root, code=3)
    assert json.loads(run("verify", root, "--json", code=3))["ok"] is False


def test_replay_writes_the_outputs(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.safetensors"
    assert "logits" in run("replay", GOLDEN / "step1_small", "--out", out)
    assert out.is_file()
    document = json.loads(run("replay", GOLDEN / "step1_small", "--out", out, "--json"))
    assert document["outputs"]["logits"] == [2, 180, 512]


def test_fetch_without_a_network_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
    code = run_command_line(["checkpoint", "fetch", "--to", str(tmp_path), "--endpoint", endpoint])
    told = capsys.readouterr()
    assert code == 4
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert f"stepfun-ai/Step-Audio-EditX into {tmp_path / 'Step-Audio-EditX'}" in told.err


def test_the_commands_import_no_torch() -> None:
    code = "import sys, editx.cli.checkpoint; sys.exit('torch' in sys.modules or 'onnxruntime' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, env=os.environ | {"PYTHONPATH": "."}).returncode == 0
    )
