"""Training of the reward model: Bradley-Terry on chosen and rejected answers to the same prompt.

The trunk starts from the SFT weights, the head from zero (all answers equal). Pairs of similar length share a batch.
Afterwards scores are put on a scale of mean 0 and deviation 1 over the training pairs, so that a KL weight means the
same for every reward model. Knows nothing about where pairs come from.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from services.trainer.core.batches import Encoded, encode, epoch_order, padded
from services.trainer.core.distributed import clip_gradients, join_group
from services.trainer.core.export import save_weights, write_sums
from services.trainer.core.objectives import (
    Aggregate,
    aggregate_scores,
    bradley_terry,
    calibration_error,
    pair_accuracy,
)
from services.trainer.core.runs import Observer, TrainingRun
from services.trainer.core.schedules import cosine, set_lr
from services.trainer.core.settings import (
    LoopConfig,
    OptimizerState,
    Weights,
    make_optimizer,
    plain_state,
    prepare,
    trainable,
    whole,
)
from services.trainer.data.rows import Row
from shared.checkpoints.layout import Checkpoint
from shared.checkpoints.reward import save_head
from shared.codes import Codes
from shared.errors import UserError
from shared.models.reward import Step1Reward
from shared.models.step1 import Step1
from shared.prompts import TextTokenizer

MARGIN_BINS = (0.0, 4.0, 6.0, 8.0, math.inf)


@dataclass(frozen=True)
class RewardConfig:
    """The paper: one epoch, cosine from 2e-5 to 1e-5. It states neither batch size nor how tokens aggregate.

    `aggregate` "mean" keeps the score free of length; `score_penalty` x mean(score^2) keeps scores near 0, since the
    Bradley-Terry loss sees differences only.
    """

    epochs: int = 1
    pairs_per_batch: int = 16
    aggregate: Aggregate = "mean"
    score_penalty: float = 1e-3
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(lr=2e-5, final_lr=1e-5))


@dataclass(frozen=True, eq=False)
class Pair:
    """A preference as training data."""

    chosen: Encoded
    rejected: Encoded
    category: str
    margin: float | None


def make_pairs(tokenizer: TextTokenizer, rows: Sequence[Row]) -> list[Pair]:
    """Rows with a rejected answer as pairs. Raises UserError naming a row that has none."""
    pairs = []
    for row in rows:
        if row.rejected is None:
            raise UserError(f"Row {row.id} has no rejected answer.", "Build preferences with `editx data build`.",
                            "bad_row")  # fmt: skip
        turns = row.turns()
        chosen, rejected = (encode(tokenizer, turns, side.mixed) for side in (row.target, row.rejected))
        pairs.append(Pair(chosen, rejected, row.category, row.margin))
    return pairs


class RewardTrainer:
    """Trains a Step1Reward made of `trunk` (which it changes) on pairs."""

    def __init__(
        self, trunk: Step1, tokenizer: TextTokenizer, rows: Sequence[Row], config: RewardConfig, folder: Path, *,
        data: dict[str, str] | None = None, observer: Observer | None = None,
    ) -> None:  # fmt: skip
        self.config, self.loop = config, config.loop
        self.group = join_group(self.loop.sharding, self.loop.device)
        self.pairs = make_pairs(tokenizer, rows)
        self.batches = self._plan()
        self.per_step = self.loop.accumulate * self.group.world
        self.model = cast(Step1Reward, prepare(Step1Reward(trunk), self.loop, self.group))
        self.model.trunk.lm_head.requires_grad_(False)
        self.optimizer = make_optimizer(self.model, self.loop)
        self.run = TrainingRun(
            folder, config, math.ceil(len(self.batches) / self.per_step),
            {"model": Weights(self.model), "optimizer": OptimizerState(self.optimizer)},
            data=data or {}, group=self.group, observer=observer, save_every=self.loop.save_every,
            log_every=self.loop.log_every, max_minutes=self.loop.max_minutes,
        )  # fmt: skip

    def _plan(self) -> list[list[int]]:
        """Batches of similar lengths in random order, for every epoch."""
        size = self.config.pairs_per_batch
        batches: list[list[int]] = []
        for epoch in range(self.config.epochs):
            order = epoch_order(len(self.pairs), self.loop.seed, epoch)
            for start in range(0, len(order), size * 16):
                pool = sorted(order[start : start + size * 16].tolist(), key=lambda i: len(self.pairs[i].chosen.ids))
                inside = [pool[k : k + size] for k in range(0, len(pool), size)]
                shuffle = np.random.default_rng((self.loop.seed, epoch, start)).permutation(len(inside))
                batches += [inside[k] for k in shuffle]
        return batches

    def train(self) -> Step1Reward:
        """Run to the end, then set the scale of the scores from the training pairs."""
        with self.run as run:
            for step in run.steps():
                run.finish_step(self._step(step))
        self._set_scale()
        return self.model.eval()

    def _step(self, step: int) -> dict[str, float]:
        lr = cosine(step, self.run.total, self.loop.lr, self.loop.final_lr, self.loop.warmup_steps)
        set_lr(self.optimizer, lr)
        chosen = self.batches[step * self.per_step : (step + 1) * self.per_step]
        total = sum(len(batch) for batch in chosen)
        self.optimizer.zero_grad()
        sums = {"loss": 0.0, "accuracy": 0.0, "difference": 0.0}
        for place in self.group.share(self.per_step):
            real = place < len(chosen)
            pairs = [self.pairs[i] for i in (chosen[place] if real else chosen[0])]
            better, worse = self._scores(pairs)
            loss = bradley_terry(better, worse)
            loss = loss + self.config.score_penalty * 0.5 * (better.square() + worse.square()).mean()
            share = len(pairs) / total * real
            (loss * share * self.group.gradient_scale).backward()
            sums["loss"] += float(loss.detach()) * share
            sums["accuracy"] += float(pair_accuracy(better.detach(), worse.detach())) * share
            sums["difference"] += float((better - worse).mean().detach()) * share
        self.group.reduce_gradients(trainable(self.model))
        norm = clip_gradients(trainable(self.model), self.loop.grad_clip)
        self.optimizer.step()
        return {name: self.group.total(value) for name, value in sums.items()} | {"lr": lr, "grad_norm": norm}

    def _scores(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Score of the chosen and of the rejected answer of each pair, (B,) each."""
        with self.loop.autocast():
            scores = score_chats(
                self.model, [p.chosen for p in pairs] + [p.rejected for p in pairs], self.config.aggregate
            )
        return scores[: len(pairs)], scores[len(pairs) :]

    @torch.no_grad()
    def _set_scale(self) -> None:
        """Mean and deviation over both answers of up to 512 training pairs, unless a resumed run has them already."""
        self.model.mean.zero_()
        self.model.std.fill_(1.0)
        pieces = [torch.cat(self._scores(self.pairs[s : s + 16])) for s in range(0, min(len(self.pairs), 512), 16)]
        scores = torch.cat(pieces)
        self.model.mean.copy_(scores.mean())
        self.model.std.copy_(scores.std().clamp(min=1e-3))

    def save(self, base: Checkpoint, target: Path) -> None:
        """Write the reward model as a checkpoint of its own: the published layout, flat, and the head's file.

        Every process must call; the first one writes.
        """
        trunk, head = plain_state(self.model.trunk), _plain_head(self.model)
        if self.group.is_main:
            save_reward(trunk, head, base, target, self.config.aggregate)
        self.group.wait()

    @torch.no_grad()
    def score(self, row: Row, answers: Sequence[Codes], tokenizer: TextTokenizer) -> list[float]:
        """Scores of answers to one prompt."""
        turns = row.turns()
        with self.loop.autocast():
            chats = [encode(tokenizer, turns, mixed) for mixed in answers]
            return [float(one) for one in score_chats(self.model, chats, self.config.aggregate)]

    @torch.no_grad()
    def evaluate(self, rows: Sequence[Row], tokenizer: TextTokenizer) -> dict[str, Any]:
        """Held-out pairs: accuracy with its standard error, by category and by margin, and calibration."""
        pairs = make_pairs(tokenizer, rows)
        was_training = self.model.training
        self.model.eval()
        scored = [self._scores(pairs[start : start + 16]) for start in range(0, len(pairs), 16)]
        self.model.train(was_training)
        raw = torch.cat([better - worse for better, worse in scored]).float().cpu() * float(self.model.std)
        return pair_report(raw, pairs)


def pair_report(difference: Tensor, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Accuracy by category and margin, and expected calibration error, of score differences (n,) in logits."""
    right = ((difference > 0).float() + 0.5 * (difference == 0)).tolist()
    groups: dict[str, list[float]] = defaultdict(list)
    for pair, value in zip(pairs, right, strict=True):
        groups[f"category {pair.category}"].append(value)
        if pair.margin is not None:
            low = max(edge for edge in MARGIN_BINS if edge <= max(pair.margin, 0.0))
            groups[f"margin from {low:g}"].append(value)
    accuracy = float(np.mean(right))
    probability = torch.sigmoid(difference.abs())
    return {
        "pairs": len(pairs), "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / max(1, len(pairs))),
        "calibration_error": float(calibration_error(probability, difference > 0)),
        "groups": {n: {"pairs": len(v), "accuracy": float(np.mean(v))} for n, v in sorted(groups.items())},
    }  # fmt: skip


def score_chats(model: Step1Reward, chats: Sequence[Encoded], how: Aggregate) -> Tensor:
    """Aggregated scores of the audio tokens of answers (the end token does not count), (B,)."""
    batch = padded(chats).to(model.trunk.device)
    mask = batch.weights.clone()
    for row, chat in enumerate(chats):
        mask[row, len(chat.ids) - 1] = 0
    return aggregate_scores(model(batch.ids), mask, how)


def save_reward(
    trunk: Mapping[str, Tensor], head: Step1Reward, base: Checkpoint, target: Path, how: Aggregate
) -> None:  # fmt: skip
    """Write config.json, the trunk's weights but for its output head, tokenizer.model, the head that scores and
    SHA256SUMS into one flat folder."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(head.trunk.config.to_json())
    kept = {name: tensor.to(torch.bfloat16) for name, tensor in trunk.items() if not name.startswith("lm_head.")}
    save_weights(kept, target)
    (target / "tokenizer.model").write_bytes(base.text_tokenizer_file.read_bytes())
    save_head(head, target, aggregate=how)
    write_sums(target)


@torch.no_grad()
def _plain_head(model: Step1Reward) -> Step1Reward:
    """The same model with a head that is no shard."""
    plain = Step1Reward(model.trunk)
    for own, other in ((plain.head.weight, model.head.weight), (plain.head.bias, model.head.bias),
                       (plain.mean, model.mean), (plain.std, model.std)):  # fmt: skip
        own.copy_(whole(other))
    return plain
