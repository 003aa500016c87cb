"""Servers that draw rollouts: weights arrive as versions, answers have a bounded age, lost servers are left out."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from editx.training import engine_rollouts
from services.trainer.core.runs import read_log
from services.trainer.core.sampling import Vocabulary
from services.trainer.ppo.pool import Pool
from services.trainer.ppo.rollouts import LocalRollouts, PoolRollouts
from services.trainer.ppo.sources import Request, addresses, pool_rollouts, pool_scorer
from services.trainer.ppo.trainer import prompts_of
from services.trainer.settings import TrainerSettings
from shared.checkpoints import Checkpoint
from shared.checkpoints.step1 import load_step1
from shared.checkpoints.verify import verify
from shared.errors import TransientError, UserError
from shared.inference.port import InferenceUnavailable
from tests.services.trainer.conftest import make_row
from tests.services.trainer.test_ppo import CONFIG, LowCodes, make

CONFIG = replace(CONFIG, steps=4, critic_warmup=1)


class FakeServer:
    """A server that loads what the link points to, and draws with it."""

    def __init__(self, folder: Path, vocabulary: Vocabulary) -> None:
        self.folder, self.vocabulary = folder, vocabulary
        self.loaded: list[str] = []
        self.may_load = threading.Event()
        self.may_load.set()
        self.is_away = False
        self.closed = False

    def load(self, model: str) -> None:
        assert self.may_load.wait(20)
        if self.is_away:
            raise InferenceUnavailable("away")
        checkpoint = Checkpoint.resolve(self.folder / "current")
        self.rollouts = LocalRollouts(load_step1(checkpoint, dtype=torch.float32), self.vocabulary)
        self.loaded.append(checkpoint.root.name)

    def infer(self, model, inputs, *, parameters=None):
        if self.is_away:
            raise InferenceUnavailable("away")
        assert model == "llm"
        return {"mixed": np.tile(make_row(int(parameters["seed"]) % 50).target.mixed[:5], 1)}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def servers(tmp_path: Path, tokenizer) -> list[FakeServer]:
    vocabulary = Vocabulary(tokenizer.audio_offset, tokenizer.eos)
    return [FakeServer(tmp_path / "pool", vocabulary) for _ in range(2)]


def pooled(servers: list[FakeServer], tmp_path: Path, checkpoint: Checkpoint, **how: bool) -> tuple[Pool, PoolRollouts]:
    pool = Pool(servers, tmp_path / "pool", checkpoint, **how)
    return pool, PoolRollouts(pool, pool.deploy, pool.deployed, close=pool.close)  # type: ignore[arg-type]


def test_every_server_loads_each_version_and_old_ones_are_removed(
    servers, tmp_path: Path, checkpoint: Checkpoint, fresh
) -> None:
    pool, _ = pooled(servers, tmp_path, checkpoint, ahead=False)
    model = fresh()
    for version in range(4):
        with torch.no_grad():
            model.lm_head.weight.fill_(version / 8)
        pool.deploy(version, lambda: model.state_dict())
        assert pool.deployed() == version
    assert all(server.loaded == ["v000000", "v000001", "v000002", "v000003"] for server in servers)
    assert sorted(path.name for path in (tmp_path / "pool").glob("v*")) == ["v000002", "v000003"]
    current = Checkpoint.resolve(tmp_path / "pool" / "current")
    assert verify(current).ok
    assert load_step1(current, dtype=torch.float32).lm_head.weight[0, 0].item() == 3 / 8
    pool.close()
    assert all(server.closed for server in servers)


def test_a_version_is_loaded_while_the_one_before_it_draws(
    servers, tmp_path: Path, checkpoint, fresh, tokenizer
) -> None:
    _, rollouts = pooled(servers, tmp_path, checkpoint)
    prompts, state = prompts_of(tokenizer, [make_row(0)] * 3, CONFIG), fresh().state_dict
    rollouts.update(0, state)
    for server in servers:
        server.may_load.clear()
    rollouts.update(1, state)
    assert [one.version for one in rollouts.draw(prompts, 1.0, 0)] == [0, 0, 0]
    for server in servers:
        server.may_load.set()
    rollouts.update(2, state)  # waits for version 1, so that nothing is ever two versions old
    assert all(one.version >= 1 for one in rollouts.draw(prompts, 1.0, 0))
    rollouts.close()


def test_a_lost_server_is_left_out_until_the_next_version(
    servers, tmp_path: Path, checkpoint, fresh, tokenizer
) -> None:
    _, rollouts = pooled(servers, tmp_path, checkpoint, ahead=False)
    prompts, state = prompts_of(tokenizer, [make_row(0)] * 4, CONFIG), fresh().state_dict
    rollouts.update(0, state)
    servers[0].is_away = True
    assert len(rollouts.draw(prompts, 1.0, 0)) == 4
    servers[0].is_away = False
    rollouts.update(1, state)
    assert servers[0].loaded == ["v000000", "v000001"]
    for server in servers:
        server.is_away = True
    with pytest.raises(TransientError, match="No server of the pool"):
        rollouts.draw(prompts, 1.0, 0)
    with pytest.raises(TransientError, match="took version 2"):
        rollouts.update(2, state)


@pytest.mark.parametrize(("ahead", "oldest"), [(True, 1), (False, 0)])
def test_the_log_tells_how_stale_a_runs_rollouts_are(
    ahead: bool, oldest: int, servers, tmp_path: Path, checkpoint, fresh, tokenizer
) -> None:
    _, rollouts = pooled(servers, tmp_path, checkpoint, ahead=ahead)
    config = replace(CONFIG, max_staleness=oldest)
    make(fresh, tokenizer, tmp_path / "run", config, rollouts=rollouts, scorer=LowCodes()).train()
    staleness = [line["staleness"] for line in read_log(tmp_path / "run")]
    assert len(staleness) == 4
    assert all(0 <= age <= oldest for age in staleness)
    rollouts.close()
    assert servers[0].loaded[-1] == "v000002"


def test_the_engine_is_made_from_the_base_with_room_for_a_step(checkpoint, tokenizer) -> None:
    vocabulary = Vocabulary(tokenizer.audio_offset, tokenizer.eos)
    rollouts = engine_rollouts(Request(checkpoint, checkpoint, vocabulary, CONFIG, "cpu"))
    try:
        drawn = rollouts.draw(prompts_of(tokenizer, [make_row(i) for i in range(3)], CONFIG), 1.0, 0)
        assert len(drawn) == 3
    finally:
        rollouts.close()


def test_servers_are_found_behind_a_name(checkpoint, tokenizer) -> None:
    assert addresses("triton://127.0.0.1:8001, triton://localhost:8001,triton://127.0.0.1:9001") == [
        "triton://127.0.0.1:8001", "triton://127.0.0.1:9001"
    ]  # fmt: skip
    request = Request(checkpoint, checkpoint, Vocabulary(tokenizer.audio_offset, tokenizer.eos), CONFIG, "cpu")
    with pytest.raises(UserError, match="addresses of its servers"):
        pool_rollouts(TrainerSettings())(request)
    with pytest.raises(UserError, match="need its address"):
        pool_scorer(TrainerSettings())(request)
