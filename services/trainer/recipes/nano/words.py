"""Teach the language model to say its words: `python -m services.trainer.recipes.nano.words`.

Learned from readings alone, it mumbles and leaves out words in its own answers. Here it draws several answers to a
prompt, the recogniser reads them, and every token is reinforced by how much better than in the other answers the
letters after it are said (policy gradient, a group's mean as the baseline, letter by letter: `core.letters`), and by
how near the answer's length is to the teacher's. English prompts only: clones, edits, vad and denoise; the recogniser
is frozen. Beside them some sequences of `llm` are learned as there, so that what no prompt asks for (Mandarin, sounds,
copies to the token) is not forgotten. Starts from `llm`, which it leaves alone. Needs `codes`, `plain`, `sounds` and
`recognizer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from services.trainer.core.branches import branches, states_before
from services.trainer.core.letters import Floats, aligned, owed
from services.trainer.core.sampling import Answer, Ids, Vocabulary, draw, log_probs_after
from services.trainer.recipes.nano import llm, recognizer, text_tokenizer
from services.trainer.recipes.nano.codes import Coded, Item
from services.trainer.recipes.nano.run import Run, begin, cosine, products, set_lr, trained, training_options
from shared.codes import GROUP, pairs_of
from shared.models.recognizer import Recognizer, frames_needed, letters
from shared.models.step1 import Step1
from shared.prompts import TextTokenizer, Turn, clone_turns, edit_turns
from shared.schemas.edit import Edit

UNSAID = -6.0
"""Score of every letter of an answer too short to say its text."""
LARGEST = 4.0
"""A letter cannot be further from the usual than this."""
WHOLE = 0.3
"""Weight of the whole answer's score beside those of the letters, for what reaches further than they do."""
SIX_LETTERS = 6.0**0.5
"""About as many letters share a token."""
TIMING = 1.0
"""Cost, per letter, of an answer e times as long as the teacher's reading or as short: slow speech is easy to read."""


@dataclass(frozen=True)
class WordsRecipe:
    steps: int
    prompts: int
    answers: int = 8
    """To each prompt."""
    temperature: float = 0.35
    clones: float = 0.4
    vads: float = 0.15
    denoises: float = 0.1
    """Shares of the prompts, the others are edits of the manner."""
    rehearsed: int = 1024
    """Tokens of a step that are learned as in `llm`, padding counted."""
    rehearsal: float = 0.5
    """Weight of their loss."""
    lr: float = 1e-4
    final_lr: float = 1e-5
    longest_prompt: int = 600
    """Tokens."""
    longest_answer: int = 60
    """Groups of the teacher's reading."""


CPU = WordsRecipe(steps=300, prompts=6)
GPU = WordsRecipe(steps=800, prompts=32, rehearsed=8192)


class Prompt(NamedTuple):
    """ids (n,), the most groups of an answer, the letters that it should say, and groups of the teacher's reading."""

    ids: Ids
    max_groups: int
    letters: list[int]
    groups: int


class Prompts:
    """Prompts of English readings, without their answers."""

    def __init__(self, examples: llm.Examples, recipe: WordsRecipe) -> None:
        self._examples, self._recipe = examples, recipe
        self._kinds = (self.clone, self.vad, self.denoise, self.edit)
        self._shares = np.array([recipe.clones, recipe.vads, recipe.denoises, 0.0])
        self._shares[-1] = 1 - self._shares.sum()

    def draw(self, rng: np.random.Generator) -> Prompt:
        """Any one that is short enough and whose text the recogniser can read."""
        while True:
            prompt = self._kinds[int(rng.choice(len(self._kinds), p=self._shares))](rng)
            is_short = len(prompt.ids) <= self._recipe.longest_prompt and prompt.groups <= self._recipe.longest_answer
            if is_short and prompt.letters:
                return prompt

    def clone(self, rng: np.random.Generator) -> Prompt:
        """Another sentence of the voice of a reading."""
        source, target = self._examples.pool(rng).same_voice(rng)
        turns = clone_turns(source["row"]["text"], source["clean_mixed"], target["row"]["text"])
        return self._prompt(turns, [target])

    def edit(self, rng: np.random.Generator) -> Prompt:
        """The same sentence in another manner."""
        source, target = self._examples.pool(rng).same_words(rng)
        edit = llm.edit_between(source["row"]["manner"], target["row"]["manner"])
        return self._prompt(edit_turns(edit, source["row"]["text"], source["clean_mixed"]), [target])

    def vad(self, rng: np.random.Generator) -> Prompt:
        """Two readings without a pause, as a recording is shown for vad, again."""
        both = self._examples.pool(rng).same_voice(rng)
        source = np.concatenate([item["clean_mixed"] for item in both])
        return self._prompt(edit_turns(Edit(type="vad"), None, source), both)

    def denoise(self, rng: np.random.Generator) -> Prompt:
        """A reading in noise, without it."""
        item = self._examples.pool(rng).variant(rng)
        return self._prompt(edit_turns(Edit(type="denoise"), None, item["noisy_mixed"]), [item])

    def _prompt(self, turns: list[Turn], said: Sequence[Item]) -> Prompt:
        ids = np.array(self._examples.tokenizer.encode_chat(turns), np.int64)
        groups = sum(len(item["clean_mixed"]) for item in said) // GROUP
        return Prompt(ids, int(1.6 * groups) + 6, letters(" ".join(item["row"]["text"] for item in said)), groups)


class Judged(NamedTuple):
    """Answers to one prompt: how much above the usual each letter is (K, n), where it is said (K, n), None for an
    answer too short to say them, and the mean score of each answer (K,)."""

    above: Floats
    frames: list[Floats | None]
    scores: Floats


@torch.no_grad()
def judge(reader: Recognizer, prompt: Prompt, answers: Sequence[Answer], device: torch.device) -> Judged:
    """What the recogniser hears of each letter in each answer, beside the other answers."""
    pairs, lengths = pairs_of([answer.mixed for answer in answers])
    heard = reader(pairs.to(device), lengths.to(device)).cpu().numpy()
    count = len(answers)
    scores = np.full((count, len(prompt.letters)), UNSAID)
    frames: list[Floats | None] = [None] * count
    for place, length in enumerate(lengths.tolist()):
        if length >= frames_needed(prompt.letters):
            scores[place], frames[place] = aligned(heard[place, :length], prompt.letters)
    lasting = np.array([max(1, len(answer.mixed) / GROUP) for answer in answers])
    scores -= TIMING * np.abs(np.log(lasting / prompt.groups))[:, None]
    above = np.clip((scores - scores.mean(0)) * count / (count - 1), -LARGEST, LARGEST)
    return Judged(above, frames, scores.mean(1))


def advantages(judged: Judged, answers: Sequence[Answer], scale: float) -> Tensor:
    """Of every token of the answers and their ends, (K, longest + 1), 0 behind an end and where the end was forced."""
    result = torch.zeros(len(answers), max(len(answer.mixed) for answer in answers) + 1)
    for row, (answer, above, frames) in enumerate(zip(answers, judged.above, judged.frames, strict=True)):
        count = len(answer.mixed)
        whole = above.mean() / scale
        by_letter = np.full(count + 1, whole) if frames is None else owed(above, frames, count) / scale / SIX_LETTERS
        result[row, : count + 1] = torch.from_numpy(by_letter + WHOLE * len(above) ** 0.5 * whole)
        if not answer.ended:
            result[row, count] = 0.0
    return result


def reinforce(
    model: Step1, prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]], judged: Sequence[Judged],
    vocabulary: Vocabulary, temperature: float,
) -> float:  # fmt: skip
    """Add the gradient of the advantages' expectation, per token, to the model's; returns the loss."""
    scale = float(np.sqrt(np.mean(np.concatenate([one.above.reshape(-1) for one in judged]) ** 2))) + 1e-3
    tokens = sum(len(answer.mixed) for group in answers for answer in group)
    total = 0.0
    for prompt, group, heard in zip(prompts, answers, judged, strict=True):
        row = branches(prompt.ids, [answer.mixed for answer in group], vocabulary, model.device)
        with products(model.device):
            before = states_before(model, row)
        limits = torch.full((len(group),), prompt.max_groups, device=model.device)
        log_p, _ = log_probs_after(model, before.float(), row.wanted, row.mask, limits, vocabulary, temperature)
        loss = -(advantages(heard, group, scale).to(log_p) * log_p).sum() / max(1, tokens)
        loss.backward()
        total += loss.item()
    return total


def main() -> None:
    arguments = training_options(__doc__).parse_args()
    device, recipe = begin(arguments, CPU, GPU)
    tokenizer = TextTokenizer.from_file(text_tokenizer.tokenizer_file())
    model = Step1(llm.config(llm.CPU, tokenizer.vocab_size))
    trained("llm", "model", model).to(device)
    reader = Recognizer(recognizer.config()).requires_grad_(False)
    trained("recognizer", "model", reader).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, betas=(0.9, 0.95), weight_decay=0.0)
    run = Run("words", {"model": model, "optimizer": optimizer}, arguments.steps or recipe.steps, arguments.minutes, 25)
    vocabulary = Vocabulary(tokenizer.audio_offset, tokenizer.eos)
    examples = llm.Examples(Coded(), tokenizer, replace(llm.CPU, tokens=recipe.rehearsed))
    prompts = Prompts(examples, recipe)
    while run.going:
        rng = run.rng()
        chosen = [prompts.draw(rng) for _ in range(recipe.prompts)]
        asked = [prompt for prompt in chosen for _ in range(recipe.answers)]
        drawn = draw(
            model, [prompt.ids for prompt in asked], [prompt.max_groups for prompt in asked], vocabulary,
            temperature=recipe.temperature, seed=run.step, slots=len(asked),
        )  # fmt: skip
        groups = [drawn[k : k + recipe.answers] for k in range(0, len(drawn), recipe.answers)]
        judged = [judge(reader, prompt, group, device) for prompt, group in zip(chosen, groups, strict=True)]
        set_lr(optimizer, cosine(run.step, run.steps, recipe.lr, recipe.final_lr, warmup=10))
        optimizer.zero_grad()
        loss = reinforce(model, chosen, groups, judged, vocabulary, recipe.temperature)
        batch = examples.batch(rng, 1.0).to(device)
        with products(device):
            rehearsed = llm.loss_of(model, tokenizer.audio_offset, batch, 0.0)["loss"]
        (recipe.rehearsal * rehearsed).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lasting = sum(len(answer.mixed) for answer in drawn) / sum(prompt.groups * GROUP for prompt in asked)
        run.done_step({
            "loss": loss, "score": float(np.mean([one.scores.mean() for one in judged])),
            "best": float(np.mean([one.scores.max() for one in judged])), "lasting": lasting,
            "rehearsed": rehearsed.detach(),
        }, log_every=10)  # fmt: skip


if __name__ == "__main__":
    main()
