"""What a user may get wrong about the data and settings of a training is told with its name and exit code 2."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from editx.cli.app import run
from tests.fixtures.tiny import with_reward
from tests.services.trainer.conftest import make_row


@pytest.fixture
def place(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with sets of every kind of fault, made the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny)
    rows = [make_row(k).model_dump_json() for k in range(3)]
    pairs = [make_row(k, rejected=True, margin=9.0).model_dump_json() for k in range(2)]
    same_id = json.dumps(json.loads(rows[1]) | {"id": "row-0"})
    no_tokens = json.dumps(json.loads(rows[0]) | {"id": "mute", "target": {"text": "x", "mixed": []}})
    for name, lines in {"good": rows, "empty": [], "broken": [rows[0], "{broken"], "twice": [rows[0], same_id],
                        "pairs": pairs, "mute": [rows[0], no_tokens]}.items():  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(("command", "message"), [
    ("train sft --data none.jsonl", "no data set none.jsonl: neither a folder here nor a prefix"),
    ("train sft --data empty.jsonl", "The data set empty.jsonl has no rows"),
    ("train sft --data broken.jsonl", "Row 2 (no id): broken.jsonl, line 2: row: Invalid JSON"),
    ("train sft --data binary.jsonl", "binary.jsonl cannot be read: they are no UTF-8 text"),
    ("train sft --data twice.jsonl", "Row 2 (row-0): its id is taken by a row with other content"),
    ("train sft --data mute.jsonl", "Row 2 (mute): mute.jsonl, line 2: target.mixed"),
    ("train sft --data damaged", "manifest.json is no manifest"),
    ("train sft --data good.jsonl --set row_tokens=16", "None of 3 rows fits into row_tokens=16"),
    ("train sft --data good.jsonl --held-out empty.jsonl", "The data set empty.jsonl has no rows"),
    ("train sft --data good.jsonl --held-out good.jsonl --set row_tokens=60", "row_tokens"),
    ("train sft --data good.jsonl --set loop.lr=nan", "lr must be positive"),
    ("train sft --data good.jsonl --device cuda:99", "no device 'cuda:99'"),
    ("train reward --data good.jsonl", "Row row-0 has no rejected answer"),
    ("train reward --data empty.jsonl", "has no rows"),
    ("train reward --data pairs.jsonl --held-out good.jsonl", "Row row-0 has no rejected answer"),
    ("train ppo --data empty.jsonl --reward tiny", "has no rows"),
    ("train ppo --data good.jsonl --reward tiny --held-out good.jsonl --judge lost.json", "no judge lost.json"),
])  # fmt: skip
def test_a_training_names_what_is_wrong(
    command: str, message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "ppo" in command:
        with_reward((place / "tiny").resolve(), place / "scored")
    words = shlex.split(command.replace("--reward tiny", "--reward scored"))
    assert run([*words, "--base", "tiny", "--out", "out"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert message in told
    assert "Traceback" not in told


@pytest.mark.parametrize(("command", "message"), [
    ("data stats none", "none is no data set: it is not there"),
    ("data stats broken.jsonl", "Row 2"),
    ("data check good.jsonl --against empty.jsonl", "The evaluation set empty.jsonl is empty"),
    ("data check good.jsonl --against none.jsonl", "it is not there"),
    ("data check good.jsonl --against good.jsonl", "9 leaks into evaluation sets"),
    ("data build none.yaml", "none.yaml cannot be read"),
    ("data publish empty.jsonl --store file:///tmp/never", "has no rows"),
    ("data publish good.jsonl --store ftp://x", "No artifact store is known"),
    ("data split empty.jsonl", "cannot be split"),
    ("data candidates good.jsonl --out c --checkpoint tiny", "no recording of row row-0"),
    ("eval run empty.jsonl --out e --checkpoint tiny", "holds no cases"),
    ("eval report none --out r", "no results in none"),
    ("train submit sft --data lost", "no data set lost"),
])  # fmt: skip
def test_other_commands_name_what_is_wrong(
    command: str, message: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDITX_STORE_URL", f"file://{place / 'store'}")
    assert run(shlex.split(command)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
