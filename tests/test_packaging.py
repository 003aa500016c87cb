"""The environment is pinned by plain files, the make targets work, and the pipeline calls them."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import soundfile

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines)


def names(requirements: list[str]) -> set[str]:
    found = (re.match(r"[A-Za-z0-9._-]+", requirement) for requirement in requirements)
    return {re.sub(r"[-_.]+", "-", match[0]).lower() for match in found if match}


@pytest.mark.parametrize("name", ["runtime", "dev"])
def test_constraints_are_plain_pins(name: str) -> None:
    lines = (ROOT / "constraints" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9][a-z0-9-]*==[0-9][0-9a-z.!-]*", line)] == []
    assert "torch==2.13.0" in lines


def test_every_dependency_is_pinned_and_both_files_agree() -> None:
    runtime, dev, extras = pins("runtime"), pins("dev"), PROJECT["optional-dependencies"]
    assert names(PROJECT["dependencies"] + extras["stack"] + extras["picture"]) <= runtime.keys()
    assert names(extras["dev"] + extras["compare"]) <= dev.keys()
    assert runtime.items() <= dev.items()


def test_the_pipeline_stops_at_the_first_error_and_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    assert "make test" in script.read_text()


def test_make_lists_its_targets() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"setup", "edit", "test", "lint", "nano"} <= {line.split()[0] for line in listed.splitlines()}


def test_make_edit_writes_an_edited_recording_and_its_picture(tiny: Path, tmp_path: Path) -> None:
    command = ["make", f"--old-file={sys.prefix}/.editx-ready", "edit", f"VENV={sys.prefix}", f"OUT={tmp_path / 'out'}"]
    environment = os.environ | {"EDITX_CHECKPOINT": str(tiny)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert soundfile.info(tmp_path / "out" / "en_happy_prompt.wav").duration > 0
    assert (tmp_path / "out" / "en_happy_prompt.png").stat().st_size > 0
