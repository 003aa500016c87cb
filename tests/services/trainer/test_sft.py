"""Supervised fine-tuning on the tiny model: it learns, resumes exactly, and weighs tokens alike."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.trainer.core.batches import encode
from services.trainer.core.runs import RunStopped, Silent, read_log
from services.trainer.core.settings import LoopConfig
from services.trainer.data.rows import Side
from services.trainer.sft.trainer import SftConfig, SftTrainer, evaluate_loss
from shared.errors import MissingComponent, UserError
from tests.services.trainer.conftest import make_row, random_codes

ROWS = [make_row(i) for i in range(12)]
CONFIG = SftConfig(epochs=2, row_tokens=1024, rows_per_batch=1,
                   loop=LoopConfig(lr=3e-3, final_lr=3e-4, log_every=1, save_every=2))  # fmt: skip


class StopAfter(Silent):
    """Asks for the end after some steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def progress(self, fraction: float, note: str) -> None:
        self.left -= 1

    def cancelled(self) -> bool:
        return self.left <= 0


def test_the_loss_falls_and_held_out_rows_gain(fresh, tokenizer, tmp_path: Path) -> None:
    held_out = [make_row(i) for i in range(50, 54)]
    before = evaluate_loss(fresh(), tokenizer, held_out, CONFIG)
    trainer = SftTrainer(fresh(), tokenizer, ROWS, CONFIG, tmp_path / "run")
    model = trainer.train()
    log = read_log(tmp_path / "run")
    assert log[-1]["loss"] < log[0]["loss"] - 1
    assert evaluate_loss(model, tokenizer, held_out, CONFIG) < before - 1
    assert log[0]["lr"] == pytest.approx(3e-3)
    assert log[-1]["lr"] == pytest.approx(3e-4)
    for name in ("config.json", "versions.json", "data_summary.json", "state.pt", "curves.png", "tensorboard"):
        assert (tmp_path / "run" / name).exists(), name


def test_a_run_that_was_stopped_goes_on_exactly(fresh, tokenizer, tmp_path: Path) -> None:
    whole = SftTrainer(fresh(), tokenizer, ROWS, CONFIG, tmp_path / "whole")
    whole.train()
    with pytest.raises(RunStopped, match="step 3 of"):
        SftTrainer(fresh(), tokenizer, ROWS, CONFIG, tmp_path / "parts", observer=StopAfter(3)).train()
    resumed = SftTrainer(fresh(), tokenizer, ROWS, CONFIG, tmp_path / "parts")
    assert resumed.run.step == 3
    resumed.train()
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name
    strip = [{k: v for k, v in line.items() if k != "s_per_step"} for line in read_log(tmp_path / "whole")]
    assert strip == [{k: v for k, v in line.items() if k != "s_per_step"} for line in read_log(tmp_path / "parts")]


def test_accumulated_batches_give_the_gradient_of_one_large_batch(fresh, tokenizer, tmp_path: Path) -> None:
    states = []
    for rows, accumulate in ((2, 1), (1, 2)):
        loop = replace(CONFIG.loop, accumulate=accumulate, lr=1e-4, final_lr=1e-5)
        config = replace(CONFIG, epochs=1, rows_per_batch=rows, loop=loop)
        trainer = SftTrainer(fresh(), tokenizer, ROWS, config, tmp_path / f"{rows}")
        trainer.train()
        states.append(trainer.state())
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-3, atol=2e-5)


def test_gradient_checkpointing_changes_nothing(fresh, tokenizer, tmp_path: Path) -> None:
    states = []
    for on in (False, True):
        loop = replace(CONFIG.loop, gradient_checkpointing=on)
        trainer = SftTrainer(fresh(), tokenizer, ROWS[:4], replace(CONFIG, epochs=1, loop=loop), tmp_path / str(on))
        trainer.train()
        states.append(trainer.state())
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-4, atol=1e-5)


def test_the_prompt_is_read_as_it_is_and_a_share_of_the_answer_as_other_codes(fresh, tokenizer, tmp_path: Path) -> None:
    model = fresh()
    read: list[torch.Tensor] = []
    hidden_states = model.hidden_states
    model.hidden_states = lambda ids, **more: read.append(ids) or hidden_states(ids, **more)
    config = replace(CONFIG, epochs=1, replaced=0.5)
    trainer = SftTrainer(model, tokenizer, ROWS[:1], config, tmp_path)
    trainer.train()
    chat = trainer.chats[0]
    changed = read[0][0].numpy() != chat.ids
    assert not changed[: chat.answer].any()
    assert not changed[-1]
    assert 0.2 < changed[chat.answer : -1].mean() < 0.8


def test_a_folder_of_another_config_or_other_data_is_refused(fresh, tokenizer, tmp_path: Path) -> None:
    SftTrainer(fresh(), tokenizer, ROWS[:3], CONFIG, tmp_path, data={"train": "a"})
    with pytest.raises(UserError, match="belongs to another config or other data"):
        SftTrainer(fresh(), tokenizer, ROWS[:3], CONFIG, tmp_path, data={"train": "b"})


def test_chats_longer_than_a_row_are_left_out_and_counted(fresh, tokenizer, tmp_path: Path) -> None:
    fits = max(len(encode(tokenizer, row.turns(), row.target.mixed).ids) for row in ROWS)
    long = ROWS[0].model_copy(update={"target": Side(text="so long", mixed=random_codes(40, 0))})
    trainer = SftTrainer(fresh(), tokenizer, [*ROWS, long], replace(CONFIG, row_tokens=fits), tmp_path / "a")
    assert trainer.left_out == 1
    with pytest.raises(UserError, match="None of 1 rows fits into row_tokens"):
        SftTrainer(fresh(), tokenizer, [long], replace(CONFIG, row_tokens=fits), tmp_path / "b")


def test_a_loss_that_is_no_number_stops_the_run(fresh, tokenizer, tmp_path: Path) -> None:
    broken = fresh()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="loss is nan at step 0"):
        SftTrainer(broken, tokenizer, ROWS[:3], CONFIG, tmp_path).train()


def test_lora_without_its_package_says_what_to_install(fresh, tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingComponent, match="pip install peft"):
        SftTrainer(fresh(), tokenizer, ROWS[:2], replace(CONFIG, loop=replace(CONFIG.loop, lora_rank=4)), tmp_path)
