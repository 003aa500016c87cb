"""PPO whose answers are drawn, and scored, by a real inference server: new weights reach it, and ages are measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from editx.cli.app import run
from editx.stack import process, servers
from editx.stack.models import repository
from services.llm.model import LlmModel
from services.reward.model import RewardModel
from services.trainer.core.runs import read_log
from services.trainer.reward.trainer import save_reward
from shared.checkpoints import Checkpoint
from shared.checkpoints.step1 import load_step1, load_text_tokenizer
from shared.inference.port import InferenceRequest, Tensors
from shared.inference.triton import connect
from shared.models.reward import Step1Reward
from tests.services.trainer.conftest import make_row

STEPS, WARMUP = 3, 0
ROWS = [make_row(i) for i in range(4)]


@pytest.fixture(scope="module")
def judge(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a reward model of random weights."""
    folder = tmp_path_factory.mktemp("judge") / "judge"
    shutil.copytree(tiny, folder)
    base = Checkpoint.resolve(tiny)
    torch.manual_seed(0)
    model = Step1Reward(load_step1(base, dtype=torch.float32))
    with torch.no_grad():
        model.head.weight.normal_()
    save_reward(model.trunk.state_dict(), model, base, folder / "reward", "mean")
    return folder


@pytest.fixture(scope="module")
def server(judge: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """One Triton that has the reward model and may load the language model: its URL and the folder of versions."""
    folder = tmp_path_factory.mktemp("pool")
    (folder / "current").symlink_to(judge)
    port = process.free_ports(3)
    environment = {"EDITX_CHECKPOINT": str(folder / "current"), "EDITX_SLOTS": "4", "OMP_NUM_THREADS": "1"}
    scratch = tmp_path_factory.mktemp("triton")
    program = servers.triton(port, [repository("llm"), repository("reward")], scratch, environment, ["reward"])
    running = process.start(program, scratch / "triton.log")
    try:
        process.wait_ready(program, running, scratch / "triton.log")
        yield f"triton://127.0.0.1:{port + 1}", folder
    finally:
        process.stop(running, program.stop_s)


def answer(checkpoint: Path, inputs: Tensors, parameters: dict[str, float]) -> np.ndarray:
    """What the language model of a checkpoint answers in this process."""
    model = LlmModel(Checkpoint.resolve(checkpoint))
    try:
        (found,) = model.infer([InferenceRequest(inputs, parameters, "here")])
    finally:
        model.close()
    assert not isinstance(found, Exception)
    return np.asarray(found["mixed"])


def test_a_policy_learns_from_a_servers_answers_and_scores(
    server: tuple[str, Path], judge: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    url, pool = server
    for name, value in (("POOL", url), ("POOL_FOLDER", str(pool)), ("REWARD_URL", url)):
        monkeypatch.setenv(f"EDITX_TRAINER_{name}", value)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(row.model_dump_json() + "\n" for row in ROWS))
    sizes = [f"steps={STEPS}", f"critic_warmup={WARMUP}", "prompts_per_step=3", "samples_per_prompt=2", "micro=6",
             "extra_groups=1", "max_stretch=0.7", "loop.lr=5e-2", "loop.final_lr=5e-2", "loop.log_every=1",
             "guards.kl=100"]  # fmt: skip
    arguments = ["train", "ppo", "--data", str(data), "--base", str(judge), "--reward", str(judge),
                 "--rollouts", "pool", "--scores", "pool", "--out", str(tmp_path / "ppo"),
                 *(word for size in sizes for word in ("--set", size))]  # fmt: skip
    assert run(arguments) == 0, capsys.readouterr().err
    made = Path(json.loads(capsys.readouterr().out)["checkpoint"])
    log = read_log(tmp_path / "ppo" / "run")
    assert len(log) == STEPS
    assert all(0 <= line["staleness"] <= 1 and line["dropped"] == 0 for line in log)
    assert log[0]["staleness"] == 0
    assert (pool / "current").resolve().name == f"v{STEPS - 1 - WARMUP:06d}"

    prompt = np.asarray(load_text_tokenizer(Checkpoint(judge)).encode_chat(ROWS[0].turns()), np.int64)
    inputs: Tensors = {"prompt": prompt}
    greedy = {"temperature": 0.01, "repetition_window": 0, "attempts": 1, "min_groups": 2, "max_groups": 2, "seed": 3}
    inference = connect(url)
    try:
        served = inference.infer("llm", inputs, parameters=greedy)["mixed"]
        np.testing.assert_array_equal(served, answer(pool / "current", inputs, greedy))
        assert not np.array_equal(served, answer(judge, inputs, greedy))
        request = InferenceRequest({"prompt": prompt, "mixed": ROWS[0].target.mixed}, {}, "here")
        (here,) = RewardModel(Checkpoint.resolve(judge)).infer([request])
        assert not isinstance(here, Exception)
        there = inference.infer("reward", request.inputs)
        np.testing.assert_allclose(there["scores"], here["scores"], rtol=1e-4, atol=1e-4)
    finally:
        inference.close()
    assert load_step1(Checkpoint(made), dtype=torch.float32).config == load_step1(Checkpoint(judge)).config
