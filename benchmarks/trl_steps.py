"""TRL's trainers on the same work as `benchmarks.training`: a Llama of the same sizes on chats of the same lengths.

Only steps that are the same work are timed; for the others there is a reason. Needs trl (the extra "compare"), which
nothing else here does.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from services.trainer.core.settings import LoopConfig
from shared.models.step1 import Step1Config

if TYPE_CHECKING:
    from benchmarks.training import Load

MISSING = "trl is not installed: pip install editx[compare]"
NO_PPO = (
    "none: TRL 1.16 has no PPO with a critic; its GRPO and RLOO draw the answers inside the step, from the whole "
    "vocabulary, and reward whole answers"
)
NO_ROLLOUTS = "none: TRL draws from the whole vocabulary, without the order of linguistic and semantic tokens"
WARMUP = 1


def time_step(name: str, shape: Step1Config, load: Load, loop: LoopConfig, repeats: int) -> float | str:
    """Median seconds of TRL's step "sft" or "reward", or why there is none."""
    if name == "ppo":
        return NO_PPO
    try:
        for package in ("datasets", "tokenizers", "transformers", "trl"):
            importlib.import_module(package)
    except ModuleNotFoundError:
        return MISSING
    return _sft(shape, load, loop, repeats) if name == "sft" else _reward(shape, load, loop, repeats)


def _sft(shape: Step1Config, load: Load, loop: LoopConfig, repeats: int) -> float:
    """SFTTrainer, without packing."""
    import transformers
    import trl

    model = transformers.LlamaForCausalLM(_config(shape))
    chats = _chats(shape, load, load.rows * (repeats + WARMUP), seed=0)
    rows = [{"input_ids": row, "labels": [-100] * load.prompt + row[load.prompt :]} for row in chats]
    return _run(trl.SFTTrainer, trl.SFTConfig, model, rows, load.rows, loop, repeats,
                dataset_kwargs={"skip_prepare_dataset": True})  # fmt: skip


def _reward(shape: Step1Config, load: Load, loop: LoopConfig, repeats: int) -> float:
    """RewardTrainer: the same Bradley-Terry loss through the same trunk, though of the last token's score only."""
    import transformers
    import trl

    model = transformers.LlamaForSequenceClassification(_config(shape, num_labels=1))
    pairs = [_chats(shape, load, load.rows * (repeats + WARMUP), seed) for seed in (0, 1)]
    rows = [{"chosen_ids": better, "rejected_ids": worse} for better, worse in zip(*pairs, strict=True)]
    return _run(trl.RewardTrainer, trl.RewardConfig, model, rows, load.rows, loop, repeats)


def _config(shape: Step1Config, **more: Any) -> Any:
    import transformers

    return transformers.LlamaConfig(
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, vocab_size=shape.vocab_size,
        num_attention_heads=shape.num_attention_heads, num_key_value_heads=shape.num_attention_groups,
        num_hidden_layers=shape.num_hidden_layers, pad_token_id=0, **more,
    )  # fmt: skip


def _chats(shape: Step1Config, load: Load, count: int, seed: int) -> list[list[int]]:
    ids = np.random.default_rng(seed).integers(5, shape.vocab_size, (count, load.tokens // load.rows))
    return [[int(one) for one in row] for row in ids]


def _each(rows: list[dict[str, list[int]]]) -> Iterator[dict[str, list[int]]]:
    yield from rows


def _run(
    trainer: Any, config: Any, model: Any, rows: list[dict[str, list[int]]], batch: int, loop: LoopConfig,
    repeats: int, **more: Any,
) -> float:  # fmt: skip
    """Median seconds of a trainer's steps after the first."""
    import datasets
    import tokenizers
    import transformers

    device = torch.device(loop.device)
    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_step_begin(self, *_: object, **__: object) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)

    with tempfile.TemporaryDirectory() as folder:
        settings = config(
            folder, per_device_train_batch_size=batch, max_steps=repeats + WARMUP, max_length=None, report_to=[],
            use_cpu=device.type == "cpu", save_strategy="no", learning_rate=loop.lr, disable_tqdm=True,
            bf16=loop.precision == "bf16" or (loop.precision == "auto" and device.type == "cuda"),
            gradient_checkpointing=loop.gradient_checkpointing, logging_strategy="no", **more,
        )  # fmt: skip
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
        data = datasets.IterableDataset.from_generator(_each, gen_kwargs={"rows": rows})
        trainer(model, settings, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]).train()
    return float(np.median(seconds[WARMUP:]))
