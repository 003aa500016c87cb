"""Benchmarks print a row, or a reason, for everything they promise."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import training, trl_steps
from shared.models.step1 import Step1Config


def test_the_training_benchmark_has_a_row_or_a_reason_per_step(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setitem(training.SIZES, "nano", Step1Config(32, 64, 2, 1, 1, 5400))
    monkeypatch.setattr(trl_steps, "time_step", lambda name, *_: trl_steps.NO_PPO if name == "ppo" else 0.5)
    monkeypatch.setattr(sys, "argv", ["training", "--rows", "1", "--prompt", "8", "--groups", "1", "--repeats", "1",
                                      "--threads", "1"])  # fmt: skip
    try:
        training.main()
    finally:
        torch.set_num_threads(threads)
    rows = {line.split(" | ")[0].lstrip("| "): line for line in capsys.readouterr().out.splitlines() if line[:1] == "|"}
    assert [name for name in rows if name in training.STEPS] == list(training.STEPS)
    assert "| 0.500 |" in rows["TRL, sft"]
    assert "no PPO with a critic" in rows["TRL, ppo"]
    assert "whole vocabulary" in rows["TRL, rollouts"]


def test_trl_rows_say_when_trl_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    load, loop = training.Load(1, 8, 1), training.LoopConfig(lr=1e-3, final_lr=1e-4)
    assert trl_steps.time_step("sft", training.SIZES["nano"], load, loop, 1) == trl_steps.MISSING
    assert trl_steps.time_step("ppo", training.SIZES["nano"], load, loop, 1) == trl_steps.NO_PPO
