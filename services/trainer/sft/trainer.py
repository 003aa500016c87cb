"""Supervised fine-tuning in the chat format: the loss lies on the answer's audio tokens and the end of its turn.

Rows are packed, an epoch's order depends on the seed alone, and every answer token weighs the same however batches,
accumulation and processes cut them up. Knows nothing about where rows come from or what becomes of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from services.trainer.core.batches import Batch, Encoded, encode, epoch_order, packed, plan_rows, replaced
from services.trainer.core.distributed import Group, clip_gradients, join_group
from services.trainer.core.objectives import answer_loss, grammar_only
from services.trainer.core.runs import Observer, TrainingRun
from services.trainer.core.sampling import Vocabulary
from services.trainer.core.schedules import cosine, set_lr
from services.trainer.core.settings import (
    LoopConfig,
    OptimizerState,
    Weights,
    make_optimizer,
    plain_state,
    prepare,
    trainable,
)
from services.trainer.data.rows import Row
from shared.errors import UserError
from shared.models.step1 import Step1
from shared.prompts import TextTokenizer


@dataclass(frozen=True)
class SftConfig:
    """The paper: one epoch, 1e-5 decayed to 1e-6. It states no batch size: `rows_per_batch` rows of `row_tokens` here.

    Chats longer than a row are left out and counted. `loss_over` "grammar" has a token compete only with those that
    decoding could put in its place, which suits models that were trained so (the small checkpoint); the official
    release was trained over the whole vocabulary. `replaced` is the share of an answer's tokens that are read as others
    of their kind when the next one is predicted: a small model that is tuned on clean answers alone forgets how to go
    on after its own mistakes.
    """

    epochs: int = 1
    row_tokens: int = 4096
    rows_per_batch: int = 4
    loss_over: Literal["vocabulary", "grammar"] = "vocabulary"
    replaced: float = 0.0
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(lr=1e-5, final_lr=1e-6))


class SftTrainer:
    """Trains `model` in place on rows; `train` returns it. `run.steps` are optimizer steps.

    Raises UserError when the run folder belongs to another config, RunStopped when it was asked to stop.
    """

    def __init__(
        self, model: Step1, tokenizer: TextTokenizer, rows: Sequence[Row], config: SftConfig, folder: Path, *,
        data: dict[str, str] | None = None, observer: Observer | None = None,
    ) -> None:  # fmt: skip
        self.config, self.loop = config, config.loop
        self.group: Group = join_group(self.loop.sharding, self.loop.device)
        chats = [encode(tokenizer, row.turns(), row.target.mixed) for row in rows]
        self.vocabulary, self.audio_offset = vocabulary_of(tokenizer, config), tokenizer.audio_offset
        self.chats: list[Encoded] = [chat for chat in chats if len(chat.ids) <= config.row_tokens]
        self.left_out = len(chats) - len(self.chats)
        if not self.chats:
            raise UserError(f"None of {len(chats)} rows fits into row_tokens={config.row_tokens}.",
                            "Raise row_tokens.", "invalid_training")  # fmt: skip
        self.batches = self._plan()
        self.per_step = self.loop.accumulate * self.group.world
        self.model = cast(Step1, prepare(model, self.loop, self.group))
        self.optimizer = make_optimizer(self.model, self.loop)
        self.run = TrainingRun(
            folder, config, math.ceil(len(self.batches) / self.per_step),
            {"model": Weights(self.model), "optimizer": OptimizerState(self.optimizer)},
            data=data or {}, group=self.group, observer=observer, save_every=self.loop.save_every,
            log_every=self.loop.log_every, max_minutes=self.loop.max_minutes,
        )  # fmt: skip
        if self.group.is_main and not self.run.step:
            self.run.note("data_summary.json", {"rows": len(self.chats), "left_out_too_long": self.left_out})

    def _plan(self) -> list[list[list[int]]]:
        """Every batch of every epoch: rows of indices into the chats."""
        lengths = [len(chat.ids) for chat in self.chats]
        batches: list[list[list[int]]] = []
        for epoch in range(self.config.epochs):
            order = epoch_order(len(lengths), self.loop.seed, epoch).tolist()
            rows = plan_rows(lengths, order, self.config.row_tokens)
            size = self.config.rows_per_batch
            batches += [rows[start : start + size] for start in range(0, len(rows), size)]
        return batches

    def train(self) -> Step1:
        """Run to the end of the last epoch, from wherever the folder's state is."""
        with self.run as run:
            for step in run.steps():
                run.finish_step(self._step(step))
        return self.model.eval()

    def state(self) -> dict[str, Tensor]:
        """The trained weights under the published names."""
        return plain_state(self.model)

    def _step(self, step: int) -> dict[str, float]:
        lr = cosine(step, self.run.total, self.loop.lr, self.loop.final_lr, self.loop.warmup_steps)
        set_lr(self.optimizer, lr)
        chosen = self.batches[step * self.per_step : (step + 1) * self.per_step]
        total = sum(self.chats[item].answer_tokens for batch in chosen for row in batch for item in row)
        self.optimizer.zero_grad()
        loss = 0.0
        for place in self.group.share(self.per_step):
            rows = chosen[place] if place < len(chosen) else chosen[0]
            batch = packed([[self.chats[item] for item in row] for row in rows])
            rng = np.random.default_rng((self.loop.seed, step, place))
            given = replaced(batch.ids, self.audio_offset, self.config.replaced, rng)
            given = torch.where(batch.weights > 0, given, batch.ids).to(self.loop.device)
            with self.loop.autocast():
                part = sft_loss(self.model, batch.to(self.loop.device), total, self.vocabulary, given)
                part = part * (place < len(chosen))
            (part * self.group.gradient_scale).backward()
            loss += float(part.detach())
        self.group.reduce_gradients(trainable(self.model))
        norm = clip_gradients(trainable(self.model), self.loop.grad_clip)
        self.optimizer.step()
        return {"loss": self.group.total(loss), "lr": lr, "grad_norm": norm, "tokens": float(total)}


def vocabulary_of(tokenizer: TextTokenizer, config: SftConfig) -> Vocabulary | None:
    """Where the grammar's tokens lie, if the loss is over them alone."""
    return Vocabulary(tokenizer.audio_offset, tokenizer.eos) if config.loss_over == "grammar" else None


def sft_loss(
    model: Step1, batch: Batch, total: float, vocabulary: Vocabulary | None = None, given: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Sum of -log p of the batch's answer tokens over `total`, the answer tokens of the whole optimizer step.

    With a `vocabulary`, p is over what the grammar lets stand in a token's place. `given` (B, L) are the ids that are
    read where they are not the batch's own.
    """
    hidden = model.hidden_states(batch.ids if given is None else given, document_ids=batch.document_ids)
    wanted, weights = batch.ids[:, 1:], batch.weights[:, 1:]
    used = weights > 0
    logits = model.lm_head(hidden[:, :-1][used])  # only positions with a loss: logits are the largest tensor
    if vocabulary is not None:
        logits = grammar_only(logits, wanted[used], vocabulary.offset, vocabulary.eos)
    return answer_loss(logits, wanted[used], weights[used], total)


@torch.no_grad()
def evaluate_loss(model: Step1, tokenizer: TextTokenizer, rows: Sequence[Row], config: SftConfig) -> float:
    """Mean -log p per answer token of held-out rows, in nats. Raises UserError naming one that is too long."""
    chats = [encode(tokenizer, row.turns(), row.target.mixed) for row in rows]
    for row, chat in zip(rows, chats, strict=True):
        if len(chat.ids) > config.row_tokens:
            raise UserError(f"The held-out row {row.id} has {len(chat.ids)} tokens, row_tokens is {config.row_tokens}.",
                            "Raise row_tokens, or leave the row out.", "bad_row")  # fmt: skip
    plan = plan_rows([len(chat.ids) for chat in chats], range(len(chats)), config.row_tokens)
    total = sum(chat.answer_tokens for chat in chats)
    loss = 0.0
    for items in plan:
        batch = packed([[chats[item] for item in items]]).to(config.loop.device)
        with config.loop.autocast():
            loss += float(sft_loss(model, batch, total, vocabulary_of(tokenizer, config)))
    return loss
