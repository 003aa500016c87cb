"""The commands in docs/training.md exist, with every option that they are shown with, and none is left out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import get_args

import click
import pytest
import typer.main

from editx.cli import data, evaluate, train
from services.trainer.data.specs import Kind

TEXT = (Path(__file__).parents[3] / "docs/training.md").read_text(encoding="utf-8")
GROUPS = {"data": data.app, "train": train.app, "eval": evaluate.app}
LINES = [
    line.strip().split("  #")[0]
    for line in TEXT.splitlines()
    if re.match(r"    (editx|torchrun .* editx) (data|train|eval) ", line)
]


@pytest.mark.parametrize("line", LINES)
def test_a_documented_command_exists_with_its_options(line: str) -> None:
    words = shlex.split(line[line.index("editx") :].removeprefix("editx "))
    group = typer.main.get_command(GROUPS[words[0]])
    commands: dict[str, click.Command] = group.commands  # type: ignore[attr-defined]
    known = {name for parameter in commands[words[1]].params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known


def test_every_kind_of_set_and_every_command_for_data_is_documented() -> None:
    assert all(f"| `{kind}` |" in TEXT for kind in get_args(Kind))
    for name, app in GROUPS.items():
        group = typer.main.get_command(app)
        for command in group.commands:  # type: ignore[attr-defined]
            assert f"editx {name} {command}" in " ".join(TEXT.split()), f"{name} {command} is not documented"
    assert len(LINES) > 15
