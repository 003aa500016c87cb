"""Which processes a stack has, and which models it asks Triton to load: those that its checkpoint has."""

from __future__ import annotations

from pathlib import Path

from editx.stack.stack import Options, Stack
from tests.fixtures.tiny import with_reward


def loaded(folder: Path, checkpoint: str) -> list[str]:
    command = Stack(folder, Options(checkpoint=checkpoint)).program("triton").command
    return [part.partition("=")[2] for part in command if part.startswith("--load-model")]


def test_a_checkpoint_without_a_reward_model_is_served_without_one(tiny: Path, tmp_path: Path) -> None:
    assert loaded(tmp_path, "nano") == ["tokenizer", "llm", "decoder"]
    assert loaded(tmp_path, str(with_reward(tiny, tmp_path / "judged"))) == ["tokenizer", "llm", "reward", "decoder"]


def test_the_five_services_the_intake_and_the_gateway_are_part_of_it(tmp_path: Path) -> None:
    stack = Stack(tmp_path, Options())
    workers = [f"{service}-0" for service in ("tokenizer", "llm", "reward", "decoder", "trainer")]
    assert {*workers, "intake", "gateway"} < set(stack.names())
    assert stack.program("trainer-0").command[-1] == "services.trainer.worker"


def test_a_stack_of_null_models_has_the_real_trainer(tmp_path: Path) -> None:
    stack = Stack(tmp_path, Options(inference="null"))
    assert stack.program("llm-0").command[-2:] == ("editx.stack.null", "llm")
    assert stack.program("trainer-0").command[-1] == "services.trainer.worker"
