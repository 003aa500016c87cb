"""The README shows commands that work: fenced `make` and `editx` lines are parsed, and run where that takes no network.

They run in a folder that holds the repository's `tests` only, on a tiny checkpoint.
"""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from editx.cli import checkpoint
from editx.cli.app import app, run

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
NOT_RUN = ("fetch", "official", "--asr", "serve", "worker", "stack", "train", "submit", "cuda", "&")
FENCE = re.compile(r"^```(?:bash|sh|shell|console|)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[str]:
    """The README's command lines that start with a program, continued lines joined, comments and prompts removed."""
    found = []
    for block in FENCE.findall(README.read_text(encoding="utf-8") if README.is_file() else ""):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            if words and words[0] == program:
                found.append(shlex.join(words))
    return found


def test_the_readme_shows_how_to_edit_a_recording() -> None:
    assert "make edit" in commands("make")
    assert any(command.startswith("editx edit ") for command in commands("editx"))


@pytest.mark.parametrize("command", commands("make"))
def test_every_make_target_of_the_readme_exists(command: str) -> None:
    words = [word for word in shlex.split(command)[1:] if word != "-n"]
    result = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", commands("editx"))
def test_every_editx_command_of_the_readme_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parsed: Any = typer.main.get_command(app)
    words = [word for word in shlex.split(command.split(" > ")[0])[1:] if word != "&"]
    if words[:1] == ["checkpoint"]:
        parsed, words = typer.main.get_command(checkpoint.app), words[1:]
    while hasattr(parsed, "get_command") and words and not words[0].startswith("-"):
        parsed = parsed.get_command(typer.Context(parsed), words.pop(0))
        assert parsed is not None, f"no such command: {command}"
    for option in (word.split("=")[0] for word in words if re.fullmatch(r"--?[a-zA-Z].*", word)):
        known = {name for parameter in parsed.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert option in known or option == "--help", f"{option} is not an option of: {command}"


def test_the_editx_commands_of_the_readme_run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = shutil.copytree(tiny, tmp_path / "checkpoint")
    (checkpoint / "editx.json").unlink()  # without it every published edit is taken as known
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDITX_CHECKPOINT", str(checkpoint))
    monkeypatch.setenv("HOME", str(tmp_path))
    for command in commands("editx"):
        words = [str(checkpoint) if word == "nano" else word for word in shlex.split(command)[1:]]
        if not any(word in words for word in NOT_RUN):
            assert run(words) == 0, command
