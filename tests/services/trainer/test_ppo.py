"""PPO on the tiny model: a known reward rises, the critic warms up alone, runs resume exactly, guards stop."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from services.trainer.core.runs import RunStopped, read_log
from services.trainer.core.sampling import Vocabulary, log_probs, sequences
from services.trainer.core.settings import LoopConfig
from services.trainer.ppo.config import Guards, PpoConfig
from services.trainer.ppo.guards import Runaway, Watch, divergence
from services.trainer.ppo.rollouts import LocalRollouts, LocalScorer, PoolRollouts, PoolScorer, Prompt, Rollout
from services.trainer.ppo.trainer import PpoTrainer, hardest, prompts_of
from shared.checkpoints.step1 import load_step1
from shared.errors import TransientError
from shared.models.reward import Step1Reward
from tests.services.trainer.conftest import make_row, random_codes
from tests.services.trainer.test_sft import StopAfter

OPEN = Guards(kl=50.0, shortest=0.0, longest=100.0, reward=100.0)
CONFIG = PpoConfig(
    steps=12, critic_warmup=2, prompts_per_step=4, samples_per_prompt=4, minibatch=8, micro=8, max_stretch=1.0,
    extra_groups=0, kl_beta=0.01, unfinished_penalty=0.0, critic_lr=3e-3, critic_final_lr=1e-3, guards=OPEN,
    watch_every=4, loop=LoopConfig(lr=3e-3, final_lr=1e-3, log_every=1, save_every=3),
)  # fmt: skip


PROMPTS = [Prompt(np.array([1, 4, 70 + i, 80 + i, 3, 4, 15, 78]), 3) for i in range(6)]


@pytest.fixture(scope="module")
def sixteen(checkpoint, tokenizer):
    """A maker of copies of a policy that has learned to use 16 semantic codes only, all alike."""
    model = load_step1(checkpoint, dtype=torch.float32)
    vocabulary = Vocabulary(tokenizer.audio_offset, tokenizer.eos)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(80):
        answers = [random_codes(3, step * 6 + k, 0, 16) for k in range(6)]
        batch = sequences([p.ids for p in PROMPTS], answers, [3] * 6, vocabulary, "cpu")
        optimizer.zero_grad()
        (-log_probs(model, batch, vocabulary)[0].sum() / batch.mask.sum()).backward()
        optimizer.step()
    return lambda: copy.deepcopy(model)


class LowCodes:
    """The known reward: 1 for a semantic code below 8, -1 for one above, 0 for linguistic codes."""

    def score(self, rollouts: list[Rollout]) -> list[np.ndarray]:
        def one(mixed: np.ndarray) -> np.ndarray:
            return np.where(mixed < 1024, 0.0, np.where(mixed < 1024 + 8, 1.0, -1.0)).astype(np.float32)

        return [one(rollout.mixed) for rollout in rollouts]


def make(fresh, tokenizer, folder: Path, config: PpoConfig = CONFIG, **extra) -> PpoTrainer:
    vocabulary = Vocabulary(tokenizer.audio_offset, tokenizer.eos)
    rollouts = extra.pop("rollouts", None) or LocalRollouts(fresh(), vocabulary, slots=16)
    return PpoTrainer(fresh(), Step1Reward(fresh()), fresh(), PROMPTS, rollouts, extra.pop("scorer", LowCodes()),
                      vocabulary, config, folder, **extra)  # fmt: skip


def test_a_known_reward_rises(sixteen, tokenizer, tmp_path: Path) -> None:
    make(sixteen, tokenizer, tmp_path).train()
    log = read_log(tmp_path)
    assert log[-1]["reward"] > log[0]["reward"] + 0.15
    assert log[-1]["kl"] > 0
    assert {"value_loss", "policy_loss", "clipped", "entropy", "explained_variance", "length"} <= log[-1].keys()


def test_the_actor_stands_still_while_the_critic_warms_up(fresh, tokenizer, tmp_path: Path) -> None:
    trainer = make(fresh, tokenizer, tmp_path, replace(CONFIG, steps=3, critic_warmup=3))
    start = {n: p.clone() for n, p in trainer.actor.named_parameters()}
    critic = trainer.critic.head.weight.clone()
    trainer.train()
    assert all(torch.equal(start[n], p) for n, p in trainer.actor.named_parameters())
    assert not torch.equal(critic, trainer.critic.head.weight)
    assert all("policy_loss" not in line and line["lr"] == 0 for line in read_log(tmp_path))


def test_the_first_ratio_is_one_and_the_first_divergence_zero(fresh, tokenizer, tmp_path: Path) -> None:
    trainer = make(fresh, tokenizer, tmp_path, replace(CONFIG, steps=1, critic_warmup=0, epochs=1, minibatch=64))
    trainer.train()
    line = read_log(tmp_path)[0]
    assert line["kl"] == pytest.approx(0, abs=1e-6)
    assert line["clipped"] == 0


def test_a_resumed_run_equals_one_that_was_never_stopped(fresh, tokenizer, tmp_path: Path) -> None:
    config = replace(CONFIG, steps=6)
    whole = make(fresh, tokenizer, tmp_path / "whole", config)
    whole.train()
    with pytest.raises(RunStopped):
        make(fresh, tokenizer, tmp_path / "parts", config, observer=StopAfter(4)).train()
    resumed = make(fresh, tokenizer, tmp_path / "parts", config)
    assert resumed.run.step == 4
    resumed.train()
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name


def test_the_judge_is_watched_beside_the_reward(fresh, tokenizer, tmp_path: Path) -> None:
    trainer = make(fresh, tokenizer, tmp_path, replace(CONFIG, steps=5))
    trainer.watched, trainer.judge = trainer.prompts[:2], lambda places, answers: 0.5
    trainer.train()
    checks = trainer.watch.checks
    assert [one["step"] for one in checks] == [0, 4]
    assert all(one["judge"] == 0.5 and one["divergence"] == 0 for one in checks)
    assert (tmp_path / "checks.json").exists()
    assert (tmp_path / "reward_and_judge.png").exists()


def test_a_runaway_stops_the_run_with_its_state_saved(fresh, tokenizer, tmp_path: Path) -> None:
    config = replace(CONFIG, guards=replace(OPEN, reward=1e-9))
    with pytest.raises(Runaway, match="the mean reward is"):
        make(fresh, tokenizer, tmp_path, config).train()
    assert (tmp_path / "state.pt").exists()


@pytest.mark.parametrize(("kl", "length", "reward", "message"), [
    (0.6, 100, 0, "nats per token"), (0.1, 40, 0, "times as long"), (0.1, 190, 0, "times as long"),
    (0.1, 100, 9, "deviations"), (0.1, 100, -9, "deviations"),
])  # fmt: skip
def test_each_guard_names_what_ran_away(kl: float, length: float, reward: float, message: str) -> None:
    watch = Watch(Guards())
    watch.step(0, 0.0, 100, 0.0)
    with pytest.raises(Runaway, match=message):
        watch.step(1, kl, length, reward)


def test_reward_hacking_is_a_reward_that_rises_while_the_judge_falls() -> None:
    watch = Watch(Guards(gap_checks=2, gap=0.05))
    assert watch.check(0, 0.0, 0.5) == 0
    assert watch.check(1, 0.5, 0.6) == 0
    assert watch.check(2, 0.9, 0.5) == pytest.approx(0.1)
    with pytest.raises(Runaway, match="reward hacking"):
        watch.check(3, 1.0, 0.4)


def test_a_judge_that_falls_with_the_reward_is_no_hacking() -> None:
    assert divergence([{"reward": 1.0, "judge": 0.9}, {"reward": 0.5, "judge": 0.1}]) == 0


def test_rollouts_older_than_the_bound_are_dropped_and_counted(fresh, tokenizer, tmp_path: Path) -> None:
    vocabulary = Vocabulary(tokenizer.audio_offset, tokenizer.eos)

    class Stuck(LocalRollouts):
        """A pool that never takes new weights."""

        def update(self, version, state) -> None:
            self._model.load_state_dict(dict(state()))

    config = replace(CONFIG, steps=6, critic_warmup=1, max_staleness=2)
    trainer = make(fresh, tokenizer, tmp_path, config, rollouts=Stuck(fresh(), vocabulary))
    with pytest.raises(TransientError, match="older than the bound"):
        trainer.train()
    assert [line["staleness"] for line in read_log(tmp_path)] == [0, 0, 1, 2]
    assert trainer.dropped == 16


def test_the_pool_draws_with_the_policy_alone_and_scores_by_the_service(fresh, tokenizer) -> None:
    asked = []

    class Pool:
        def infer(self, model, inputs, *, parameters=None, **_):
            asked.append((model, parameters))
            mixed = make_row(0).target.mixed[:5]
            return {"mixed": mixed} if model == "llm" else {"scores": np.ones(len(inputs["mixed"]), np.float32)}

    deployed = []
    pool = PoolRollouts(Pool(), lambda version, state: deployed.append(version), lambda: deployed[-1])
    pool.update(7, dict)
    prompts = prompts_of(tokenizer, [make_row(0), make_row(1)], CONFIG)
    drawn = pool.draw(prompts, 1.0, seed=3)
    assert [one.version for one in drawn] == [7, 7]
    assert all(one.ended for one in drawn)
    assert all(p["repetition_window"] == 0 and p["attempts"] == 1 and p["top_p"] == 1.0 for _, p in asked)
    assert len({p["seed"] for _, p in asked}) == 2
    assert [len(s) for s in PoolScorer(Pool()).score(drawn)] == [5, 5]


def test_local_scores_are_those_of_the_answers_tokens(fresh, tokenizer) -> None:
    vocabulary = Vocabulary(tokenizer.audio_offset, tokenizer.eos)
    model = Step1Reward(fresh())
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    prompts = prompts_of(tokenizer, [make_row(0), make_row(1)], CONFIG)
    rollouts = [Rollout(p, make_row(i).target.mixed[: 5 * (i + 1)], True, 0) for i, p in enumerate(prompts)]
    together = LocalScorer(model, vocabulary).score(rollouts)
    for rollout, scores in zip(rollouts, together, strict=True):
        ids = np.concatenate([rollout.prompt.ids, rollout.mixed + vocabulary.offset])
        with torch.no_grad():
            expected = model(torch.from_numpy(ids)[None])[0, len(rollout.prompt.ids) :]
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_the_hardest_prompts_are_those_that_scored_lowest() -> None:
    rows = [make_row(i) for i in range(4)]
    assert [row.id for row in hardest(rows, [0.9, 0.1, 0.5, 0.2], 0.5)] == ["row-1", "row-3"]
    assert len(hardest(rows, [1, 1, 1, 1], 0.01)) == 1
