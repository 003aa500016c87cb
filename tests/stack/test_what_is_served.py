"""Which models a stack asks Triton to load: those that its checkpoint has."""

from __future__ import annotations

from pathlib import Path

from editx.stack.stack import Options, Stack
from tests.fixtures.tiny import with_reward


def loaded(folder: Path, checkpoint: str) -> list[str]:
    command = Stack(folder, Options(checkpoint=checkpoint)).program("triton").command
    return [part.partition("=")[2] for part in command if part.startswith("--load-model")]


def test_a_checkpoint_without_a_reward_model_is_served_without_one(tiny: Path, tmp_path: Path) -> None:
    assert loaded(tmp_path, "nano") == ["tokenizer", "llm", "decoder"]
    assert loaded(tmp_path, str(with_reward(tiny, tmp_path / "judged"))) == ["tokenizer", "llm", "decoder", "reward"]
