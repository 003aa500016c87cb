"""Teach the language model's edits their manner: `python -m services.trainer.recipes.nano.manner`.

Edits are served guided (away from the same said plainly), and what guidance makes of a model that was not trained with
it is slow and goes too far in one edit and not far enough in another. Here answers are drawn guided and reinforced,
beside their words, for how near they come to the teacher's reading in F0, its range, duration, loudness and voicing,
and somewhat beyond it, since the flow flattens all of them. That is measured off the codes (`shared.models.prosody`),
so nothing has to be sampled. What is likely after the prompt is learned, the other prompt is taken as it is.
Starts from `words`, which it leaves alone. Needs what that does, `flow` or `heard`, and `vocoder`. Leaves what each
manner changes on average beside its state, for the choice among answers.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from services.trainer.core.letters import Floats
from services.trainer.core.sampling import Answer
from services.trainer.recipes.nano import assets, llm, text_tokenizer, words
from services.trainer.recipes.nano import flow as flows
from services.trainer.recipes.nano.codes import Coded, Item
from services.trainer.recipes.nano.run import begin, last_trained, trained, training_options
from shared.codes import interleave
from shared.models.prosody import Prosody, distances
from shared.models.recognizer import letters
from shared.models.spectral import SpectralConfig, SpectralVocoder
from shared.models.step1 import Step1
from shared.prompts import TextTokenizer


@dataclass(frozen=True)
class MannerRecipe:
    words: words.WordsRecipe
    cost: float = 1.2
    """Of a letter, for an edit one step away on the mean of all measures."""
    timing: float = 0.3
    """Share of an edit's usual price of length, beside its duration here."""


CPU = MannerRecipe(replace(
    words.CPU, steps=85, prompts=8, clones=0.25, vads=0.08, denoises=0.07, temperature=0.3, lr=1.5e-4, guidance=1.5
))  # fmt: skip
GPU = MannerRecipe(replace(CPU.words, steps=800, prompts=32, rehearsed=8192))


def prosody_of_runs(device: torch.device) -> Prosody:
    """What measures codes, of the trained flow and vocoder."""
    vocoder = SpectralVocoder(SpectralConfig())
    trained("vocoder", "model", vocoder)
    flow = flows.averaged(last_trained("flow", "heard")).requires_grad_(False).to(device).eval()
    return Prosody(flow, vocoder.f0_predictor.requires_grad_(False).to(device).eval())


def average_changes(items: Iterable[Item], prosody: Prosody) -> dict[str, list[float]]:
    """What each manner changes of a plain reading on average (`shared.models.prosody.MEASURES`), by its name, of the
    English readings among items."""
    groups: dict[int, dict[str, Item]] = defaultdict(dict)
    for item in items:
        if letters(item["row"]["text"]):
            groups[item["row"]["group"]][item["row"]["manner"]] = item
    found: dict[str, list[Floats]] = defaultdict(list)
    for group in groups.values():
        if "neutral" in group and len(group) > 1:
            measures = dict(zip(group, prosody([interleave(*item["clean"]) for item in group.values()]), strict=True))
            for manner, measured in measures.items():
                if manner != "neutral":
                    found[manner].append(measured - measures["neutral"])
    return {manner: np.nanmean(found[manner], 0).round(3).tolist() for manner in sorted(found)}


def changes_file() -> Path:
    """Where the run keeps what `average_changes` found."""
    return assets.data_dir() / "runs" / "manner" / "changes.json"


def manner_cost(prosody: Prosody, recipe: MannerRecipe) -> words.Cost:
    """What an answer pays: for its length, and an edit for its manner."""

    def cost(prompt: words.Prompt, answers: Sequence[Answer]) -> Floats:
        length = words.timing(prompt, answers)
        if prompt.readings is None:
            return length
        found = prosody([prompt.readings.source, prompt.readings.target, *(answer.mixed for answer in answers)])
        return recipe.timing * length + recipe.cost * distances(found[0], found[1] - found[0], found[2:])

    return cost


def main() -> None:
    arguments = training_options(__doc__).parse_args()
    device, recipe = begin(arguments, CPU, GPU)
    tokenizer = TextTokenizer.from_file(text_tokenizer.tokenizer_file())
    model = Step1(llm.config(llm.CPU, tokenizer.vocab_size))
    trained("words", "model", model).to(device)
    prosody = prosody_of_runs(device)
    if not changes_file().exists():
        changes_file().parent.mkdir(parents=True, exist_ok=True)
        changes_file().write_text(json.dumps(average_changes(Coded().items, prosody)))
    words.learn("manner", model, recipe.words, arguments, tokenizer, manner_cost(prosody, recipe))


if __name__ == "__main__":
    main()
