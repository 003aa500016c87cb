"""Train the recogniser: codes to letters, by CTC. `python -m services.trainer.recipes.nano.recognizer`.

It tells which of several answers of a language model says its text best (services.llm.choice). Its layers start as the
flow's, which know already what codes sound like. English readings only: `plain`, the corpus and, where they are there,
its other speeds. Some codes are others, since a language model's answers hold such. Needs `plain`, `codes` and `flow`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.trainer.recipes.nano import perturbed, plain
from services.trainer.recipes.nano.codes import Coded, Item, other_codes
from services.trainer.recipes.nano.flow import SECTION, averaged
from services.trainer.recipes.nano.run import (
    Optimizer,
    Run,
    begin,
    cosine,
    count_parameters,
    products,
    set_lr,
    training_options,
)
from shared.codes import LINGUISTIC_PAD, interleave, time_align
from shared.models.recognizer import Recognizer, RecognizerConfig, letters

LETTERS_PER_FRAME = 0.9
"""More cannot be told apart from blanks: such readings are left out."""


@dataclass(frozen=True)
class RecognizerRecipe:
    steps: int
    frames: int
    """Of 40 ms in a batch, filling included."""
    lr: float = 1e-3
    final_lr: float = 3e-5
    replaced: float = 0.12
    """Largest share of a reading's codes that are others of their kind."""


CPU = RecognizerRecipe(steps=2000, frames=2600)
GPU = RecognizerRecipe(steps=4000, frames=24_000)


@dataclass(frozen=True)
class Reading:
    pairs: Tensor
    """(T, 2) at 25 Hz."""
    letters: list[int]


def readings(items: Iterable[Item]) -> list[Reading]:
    """The English ones, shortest first."""
    found = []
    for item in items:
        spoken = letters(item["row"]["text"]) if item["row"]["language"] == "en" else []
        pairs = time_align(torch.from_numpy(interleave(*item["clean"]).astype(np.int64)))
        if spoken and len(spoken) <= LETTERS_PER_FRAME * len(pairs):
            found.append(Reading(pairs.to(torch.int16), spoken))
    return sorted(found, key=lambda reading: len(reading.pairs))


def draw(
    found: list[Reading], rng: np.random.Generator, recipe: RecognizerRecipe
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Readings of about one length: pairs (B, T, 2) with other codes among them, lengths (B,), letters."""
    last = int(rng.integers(len(found)))
    count = max(1, recipe.frames // len(found[last].pairs))
    chosen = found[max(0, last + 1 - count) : last + 1]
    rows = []
    for reading in chosen:
        pairs = reading.pairs.long()
        others = other_codes(len(pairs), rng)
        is_other = torch.from_numpy(rng.random(pairs.shape) < rng.uniform(0, recipe.replaced))
        rows.append(torch.where(is_other & (pairs != LINGUISTIC_PAD), others, pairs))
    lengths = torch.tensor([len(row) for row in rows])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths, [reading.letters for reading in chosen]


def start(model: Recognizer) -> None:
    """The flow's embedding and the layers of its encoder before doubling. Raises SystemExit where it is missing."""
    known: dict[str, Tensor] = {}
    for name, value in averaged("flow").state_dict().items():
        known[name.removeprefix("encoder.").replace("input_embedding.", "embedding.")] = value
    model.load_state_dict({name: known.get(name, value) for name, value in model.state_dict().items()})


def config() -> RecognizerConfig:
    """The sizes of the small checkpoint's: those of the flow's encoder."""
    encoder = SECTION["encoder"]
    return RecognizerConfig(
        vocab_size=SECTION["vocab_size"], size=encoder["output_size"], num_blocks=encoder["num_blocks"],
        attention_heads=encoder["attention_heads"], linear_units=encoder["linear_units"],
        lookahead=encoder["pre_lookahead_len"],
    )  # fmt: skip


def main() -> None:
    arguments = training_options(__doc__).parse_args()
    device, recipe = begin(arguments, CPU, GPU)
    torch.manual_seed(6)
    model = Recognizer(config())
    start(model)
    model.to(device)
    optimizer = Optimizer(model, recipe.lr, outside=("embedding", "head"))
    run = Run(
        "recognizer", {"model": model, "optimizers": optimizer}, arguments.steps or recipe.steps, arguments.minutes
    )
    found = readings([*plain.items(), *Coded().items, *perturbed.items()])
    hours = sum(len(reading.pairs) for reading in found) / 25 / 3600
    print(f"recognizer: {count_parameters(model):.2f} M parameters, {len(found)} readings, {hours:.1f} h, on {device}",
          flush=True)  # fmt: skip
    while run.going:
        pairs, lengths, texts = draw(found, run.rng(), recipe)
        set_lr(optimizer, cosine(run.step, run.steps, recipe.lr, recipe.final_lr))
        with products(device):
            loss = model.loss(pairs.to(device), lengths.to(device), texts).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        run.done_step({"ctc": loss.detach()})


if __name__ == "__main__":
    main()
