"""PPO: answers are drawn, scored, and the policy is moved towards what scored above the critic's expectation.

Four models: the actor (trained), the critic (trained), the frozen reference that KL is measured against, and whatever
scores the answers. Prompts, rollouts and minibatches of a step depend on the seed and the step alone, so a resumed run
goes on exactly. Several processes may have different numbers of answers (an odd number of prompts, stale ones dropped):
all go through as many passes as the one with most, since their collective calls must meet; what fills up weighs
nothing. Knows nothing about audio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from services.trainer.core.batches import epoch_order
from services.trainer.core.distributed import Group, clip_gradients, join_group
from services.trainer.core.objectives import (
    explained_variance,
    gae,
    kl_estimate,
    masked_mean,
    policy_loss,
    shaped_rewards,
    value_loss,
    whiten,
)
from services.trainer.core.plots import draw_checks
from services.trainer.core.runs import Observer, TrainingRun, read_log
from services.trainer.core.sampling import Ids, Sequences, Vocabulary, bounds_for, log_probs, sequences
from services.trainer.core.schedules import cosine, set_lr
from services.trainer.core.settings import (
    OptimizerState,
    Weights,
    make_optimizer,
    plain_state,
    prepare,
    trainable,
)
from services.trainer.data.rows import Row
from services.trainer.ppo.config import PpoConfig
from services.trainer.ppo.guards import Runaway, Watch
from services.trainer.ppo.rollouts import Prompt, Rollout, Rollouts, Scorer
from shared.codes import Codes
from shared.errors import TransientError, UserError
from shared.models.reward import Step1Reward
from shared.models.step1 import Step1
from shared.prompts import TextTokenizer

CHECKS_PICTURE = "reward_and_judge.png"
Judge = Callable[[Sequence[int], Sequence[Codes]], float]
"""Held-out judge: which of the watched prompts, their answers -> mean score, 0 to 1."""


@dataclass(frozen=True, eq=False)
class Experience:
    """One step's rollouts, ready for updates. Token tensors (B, T)."""

    batch: Sequences
    old_log_probs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor


def prompts_of(tokenizer: TextTokenizer, rows: Sequence[Row], config: PpoConfig) -> list[Prompt]:
    """Rows as prompts; how long an answer may get follows from the longer of source and target."""
    prompts = []
    for row in rows:
        ids: Ids = np.asarray(tokenizer.encode_chat(row.turns()), np.int64)
        longest = max(len(row.source.mixed), len(row.target.mixed))
        prompts.append(Prompt(ids, bounds_for(longest, config.max_stretch, config.extra_groups)))
    return prompts


class PpoTrainer:
    """Trains `actor` and `critic` in place. The critic is a Step1Reward whose head gives values."""

    def __init__(
        self, actor: Step1, critic: Step1Reward, reference: Step1, prompts: Sequence[Prompt], rollouts: Rollouts,
        scorer: Scorer, vocabulary: Vocabulary, config: PpoConfig, folder: Path, *,
        watched: Sequence[Prompt] = (), judge: Judge | None = None,
        data: dict[str, str] | None = None, observer: Observer | None = None,
    ) -> None:  # fmt: skip
        self.config, self.loop, self.vocabulary = config, config.loop, vocabulary
        self.group = join_group(self.loop.sharding, self.loop.device)
        if config.prompts_per_step < self.group.world:
            raise UserError(f"{config.prompts_per_step} prompts a step are fewer than {self.group.world} processes.",
                            "Raise prompts_per_step, or start fewer processes.", "invalid_training")  # fmt: skip
        self.prompts, self.rollouts, self.scorer = list(prompts), rollouts, scorer
        self.watched, self.judge = list(watched), judge
        self.actor = cast(Step1, prepare(actor, self.loop, self.group))
        self.critic = cast(Step1Reward, prepare(critic, self.loop, self.group))
        self.critic.trunk.lm_head.requires_grad_(False)
        reference.attention = self.loop.attention
        self.reference = self.group.shard(reference.to(self.loop.device).requires_grad_(False).eval())
        self.actor_optimizer = make_optimizer(self.actor, self.loop)
        self.critic_optimizer = make_optimizer(self.critic, self.loop)
        self.watch = Watch(config.guards)
        self.dropped = 0
        self._has_weights = False
        self.run = TrainingRun(
            folder, config, config.steps,
            {"actor": Weights(self.actor), "critic": Weights(self.critic),
             "actor_optimizer": OptimizerState(self.actor_optimizer),
             "critic_optimizer": OptimizerState(self.critic_optimizer), "watch": self.watch},
            data=data or {}, group=self.group, observer=observer, save_every=self.loop.save_every,
            log_every=self.loop.log_every, max_minutes=self.loop.max_minutes,
        )  # fmt: skip

    def train(self) -> Step1:
        """Run all steps. Raises Runaway when a guard stops it, with the state saved."""
        with self.run as run:
            for step in run.steps():
                if step > self.config.critic_warmup or not self._has_weights:
                    self._has_weights = True
                    self.rollouts.update(self._version(step), lambda: plain_state(self.actor))
                try:
                    facts = self._step(step)
                except Runaway:
                    run.save()
                    self._note_checks()
                    raise
                run.finish_step(facts)
            self._note_checks()
        return self.actor.eval()

    def _note_checks(self) -> None:
        """Keep the judge's checks beside the reward's, as numbers and drawn over the same steps."""
        self.run.note("checks.json", self.watch.checks)
        if self.group.is_main:
            draw_checks(self.watch.checks, self.run.folder / CHECKS_PICTURE)

    def state(self) -> dict[str, Tensor]:
        """The actor's weights under the published names."""
        return plain_state(self.actor)

    def _version(self, step: int) -> int:
        """How often the actor has been updated before a step: the number of its weights."""
        return max(0, step - self.config.critic_warmup)

    def _step(self, step: int) -> dict[str, float]:
        rollouts, staleness = self._collect(step)
        experience, facts = self._experience(rollouts)
        self.watch.step(step, facts["kl"], facts["length"], facts["reward"])
        facts |= self._update(step, experience) | {"staleness": staleness, "dropped": float(self.dropped)}
        if self.watched and (step % self.config.watch_every == 0 or step == self.config.steps - 1):
            facts |= self._check(step)
        return facts

    def _collect(self, step: int) -> tuple[list[Rollout], float]:
        """This process's rollouts of a step without those that are too old; the mean age in versions."""
        per_step = self.config.prompts_per_step
        epoch, place = divmod(step * per_step, max(len(self.prompts), per_step))
        order = epoch_order(len(self.prompts), self.loop.seed, epoch)
        chosen = [int(order[(place + k) % len(order)]) for k in range(per_step)]
        mine = [chosen[k] for k in self.group.share(len(chosen))]
        asked = [self.prompts[k] for k in mine for _ in range(self.config.samples_per_prompt)]
        seed = (self.loop.seed * 1_000_003 + step) * self.group.world + self.group.rank
        drawn = self.rollouts.draw(asked, self.config.temperature, seed)
        version = self._version(step)
        fresh = [one for one in drawn if version - one.version <= self.config.max_staleness and len(one.mixed)]
        self.dropped += len(drawn) - len(fresh)
        if self.group.anywhere(not fresh):
            raise TransientError(f"Step {step}: all rollouts of a process are empty or older than the bound "
                                 f"({len(fresh)} of {len(drawn)} are left here).",
                                 "The pool does not take new weights: look at its servers.")  # fmt: skip
        return fresh, float(np.mean([version - one.version for one in fresh]))

    @torch.no_grad()
    def _experience(self, rollouts: list[Rollout]) -> tuple[Experience, dict[str, float]]:
        c = self.config
        batch = sequences([r.prompt.ids for r in rollouts], [r.mixed for r in rollouts],
                          [r.prompt.max_groups for r in rollouts], self.vocabulary, self.loop.device)  # fmt: skip
        old, reference, values, entropy = (torch.zeros_like(batch.mask) for _ in range(4))
        for start in range(0, self.group.most(len(rollouts)), c.micro):
            start = start if start < len(rollouts) else 0
            rows = torch.arange(start, min(start + c.micro, len(rollouts)), device=batch.ids.device)
            part = batch.rows(rows)
            width = part.mask.shape[1]
            with self.loop.autocast():
                old[rows, :width], entropy[rows, :width] = self._log_probs(self.actor, part)
                reference[rows, :width] = self._log_probs(cast(Step1, self.reference), part)[0]
                values[rows, :width] = self._values(part)
        scores = torch.zeros_like(batch.mask)
        for row, own in enumerate(self.scorer.score(rollouts)):
            scores[row, : len(own)] = torch.from_numpy(np.array(own)).to(scores)  # a server's arrays are read-only
        rewards = shaped_rewards(
            scores, batch.audio, kl_estimate(old, reference, "k1"), batch.mask, c.kl_beta, "mean", c.placement
        )
        unfinished = torch.tensor([not r.ended for r in rollouts], device=scores.device)
        last = batch.mask.sum(1).long() - 1
        rewards[torch.arange(len(rollouts), device=last.device), last] -= c.unfinished_penalty * unfinished.float()
        advantages, returns = gae(rewards, values, batch.mask, c.gamma, c.lam)
        reward = (scores * batch.audio).sum(1) / batch.audio.sum(1)
        kl = float(masked_mean(kl_estimate(old, reference, "k3"), batch.mask))
        answers = len(rollouts)
        facts = {
            "reward": self.group.mean(float(reward.mean()), answers), "reward_std": float(reward.std(unbiased=False)),
            "kl": self.group.mean(kl, float(batch.mask.sum())),
            "length": self.group.mean(float(batch.audio.sum(1).mean()), answers),
            "unfinished": float(unfinished.float().mean()),
            "entropy": float(masked_mean(entropy, batch.mask)),
            "explained_variance": float(explained_variance(values, returns, batch.mask)),
        }  # fmt: skip
        return Experience(batch, old, values * batch.mask, whiten(advantages, batch.mask), returns), facts

    def _log_probs(self, model: Step1, batch: Sequences) -> tuple[Tensor, Tensor]:
        return log_probs(model, batch, self.vocabulary, self.config.temperature)

    def _values(self, batch: Sequences) -> Tensor:
        """The critic's value before each answer token, (B, T)."""
        values: Tensor = self.critic(batch.ids).gather(1, batch.at)
        return values * batch.mask

    def _update(self, step: int, experience: Experience) -> dict[str, float]:
        c = self.config
        moves = step >= c.critic_warmup
        actor_lr = cosine(max(0, step - c.critic_warmup), c.steps - c.critic_warmup, self.loop.lr, self.loop.final_lr)
        set_lr(self.actor_optimizer, actor_lr)
        set_lr(self.critic_optimizer, cosine(step, c.steps, c.critic_lr, c.critic_final_lr, self.loop.warmup_steps))
        sums: dict[str, list[float]] = {}
        count = len(experience.returns)
        most = self.group.most(count)
        for epoch in range(c.epochs):
            order = np.random.default_rng((self.loop.seed, step, epoch, self.group.rank)).permutation(count)
            for start in range(0, most, c.minibatch):
                for name, value in self._minibatch(experience, order[start : start + c.minibatch], moves).items():
                    sums.setdefault(name, []).append(value)
        return {name: float(np.mean(values)) for name, values in sums.items()} | {"lr": actor_lr * moves}

    def _minibatch(self, experience: Experience, chosen: np.ndarray, moves: bool) -> dict[str, float]:
        """One optimizer step of the critic, and of the actor once it moves."""
        c = self.config
        tokens = self.group.total(float(experience.batch.mask[torch.from_numpy(chosen)].sum()))
        facts = {"value_loss": 0.0} | ({"policy_loss": 0.0, "clipped": 0.0} if moves else {})
        self.actor_optimizer.zero_grad()
        self.critic_optimizer.zero_grad()
        for start in range(0, self.group.most(len(chosen)), c.micro):
            real = start < len(chosen)
            own = chosen[start : start + c.micro] if real else np.zeros(1, np.int64)
            rows = torch.from_numpy(own).to(experience.returns.device)
            part = experience.batch.rows(rows)
            old, old_values, advantages, returns = (
                tensor[rows, : part.mask.shape[1]] for tensor in
                (experience.old_log_probs, experience.old_values, experience.advantages, experience.returns)
            )  # fmt: skip
            share = float(part.mask.sum()) / tokens * real
            with self.loop.autocast():
                critic = value_loss(self._values(part).float(), old_values, returns, part.mask, c.value_clip)
            (critic * share * self.group.gradient_scale).backward()
            facts["value_loss"] += float(critic.detach()) * share
            if moves:
                with self.loop.autocast():
                    new, entropy = self._log_probs(self.actor, part)
                    policy = policy_loss(new, old, advantages, part.mask, c.clip)
                    loss = policy.loss - c.entropy * masked_mean(entropy, part.mask)
                (loss * share * self.group.gradient_scale).backward()
                facts["policy_loss"] += float(policy.loss.detach()) * share
                facts["clipped"] += float(policy.clipped) * share
        facts["critic_norm"] = self._apply(self.critic, self.critic_optimizer)
        if moves:
            facts["actor_norm"] = self._apply(self.actor, self.actor_optimizer)
        return facts

    def _apply(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
        self.group.reduce_gradients(trainable(model))
        norm = clip_gradients(trainable(model), self.loop.grad_clip)
        optimizer.step()
        return norm

    def gains(self) -> dict[str, float]:
        """From the first to the last check of the watched prompts: reward, and the judge's score where there is one."""
        lines = [line for line in read_log(self.run.folder) if "watched_reward" in line]
        return {
            f"{name}_gain": lines[-1][name] - lines[0][name]
            for name in ("watched_reward", "judge")
            if lines and name in lines[0]
        }

    def _check(self, step: int) -> dict[str, float]:
        """Reward, and the judge's score where there is one, of answers to the watched prompts, always the same seed."""
        drawn = self.rollouts.draw(self.watched, self.config.temperature, self.loop.seed + 17)
        reward = self.group.mean(float(np.mean([own.mean() for own in self.scorer.score(drawn)])), 1)
        if self.judge is None:
            return {"watched_reward": reward}
        own = self.judge(range(len(drawn)), [one.mixed for one in drawn]) if self.group.is_main else 0.0
        judged = self.group.total(own)  # all processes drew the same: one of them asks
        return {"watched_reward": reward, "judge": judged, "divergence": self.watch.check(step, reward, judged)}


@torch.no_grad()
def as_critic(model: Step1Reward) -> Step1Reward:
    """A reward model as the critic's start: its trunk stays, values begin at zero on the scale of returns."""
    for tensor in (model.head.weight, model.head.bias, model.mean):
        tensor.zero_()
    model.std.fill_(1.0)
    return model


def start_scores(
    prompts: Sequence[Prompt], rollouts: Rollouts, scorer: Scorer, temperature: float, seed: int, group: Group
) -> list[float]:  # fmt: skip
    """The reward of one answer to each prompt, drawn with the weights that `rollouts` has; alike on every process."""
    mine = list(group.share(len(prompts)))
    drawn = rollouts.draw([prompts[k] for k in mine], temperature, seed * group.world + group.rank) if mine else []
    scores = [0.0] * len(prompts)
    for k, own in zip(mine, scorer.score(drawn), strict=True):
        scores[k] = float(own.mean())
    return group.totals(scores)


def hardest(rows: Sequence[Row], scores: Sequence[float], share: float) -> list[Row]:
    """The share of prompts (at least one) whose answers by the SFT model scored lowest, in their old order."""
    count = max(1, round(len(rows) * share))
    chosen = sorted(sorted(range(len(rows)), key=lambda i: (scores[i], i))[:count])
    return [rows[i] for i in chosen]
