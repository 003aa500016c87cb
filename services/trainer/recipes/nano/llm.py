"""Train the language model: text, then text beside audio, then clones and edits in the chat format.

`python -m services.trainer.recipes.nano.llm`. The three stages are shares of one run. Audio embeddings start from
the tokenizers' centroids, so that codes that sound alike begin alike. Needs `codes`.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from services.trainer.recipes.nano import assets, linguistic, plain, semantic, text_tokenizer, texts
from services.trainer.recipes.nano.codes import VARIANTS, Coded
from services.trainer.recipes.nano.run import Run, cosine, count_parameters, pick_device, set_lr
from shared.codes import interleave
from shared.models.step1 import Step1, Step1Config
from shared.prompts import TextTokenizer, Turn, assistant_turn, clone_turns, edit_turns
from shared.schemas.edit import Edit

CONTEXT_WEIGHT = 0.1
"""Of the tokens before the answer: the model also learns what speech looks like from the source it is given."""


@dataclass(frozen=True)
class LlmRecipe:
    steps: int
    tokens: int
    """In a batch, padding counted."""
    lr: float = 2e-3
    final_lr: float = 1e-4
    text_until: float = 0.04
    plain_until: float = 0.25
    """Shares of the steps where the text stage and the stage of text beside audio end."""
    longest: int = 900
    hidden: int = 256
    layers: int = 6


CPU = LlmRecipe(steps=3000, tokens=2048)
GPU = LlmRecipe(steps=14_000, tokens=49_152)


def config(recipe: LlmRecipe, vocabulary: int) -> Step1Config:
    """Sizes of the small Step1: the published proportions, 32 per head, four query heads to a key head."""
    return Step1Config(
        hidden_size=recipe.hidden,
        intermediate_size=recipe.hidden * 5 // 2,
        num_attention_heads=recipe.hidden // 32,
        num_attention_groups=recipe.hidden // 128,
        num_hidden_layers=recipe.layers,
        vocab_size=vocabulary,
        max_seq_len=8192,
    )


def start_audio_embedding(model: Step1, offset: int) -> None:
    """Put the centroids, projected to the model's width, into the rows of the audio ids, in and out."""
    student, autoencoder = linguistic.Student(), semantic.Autoencoder(linguistic.CONFIG.output_size)
    Run("linguistic", {"model": student}, 0)
    Run("semantic", {"model": autoencoder}, 0)
    generator = torch.Generator().manual_seed(6)
    tables: list[Tensor] = [model.model.embed_tokens.weight, model.lm_head.weight]  # type: ignore[list-item]
    with torch.no_grad():
        for centroids, first in (
            (student.codebook.centroids, 0),
            (autoencoder.codebook.centroids, len(student.codebook.centroids)),
        ):
            centred = (centroids - centroids.mean(0)) / centroids.std()
            projection = (
                torch.randn(centroids.shape[1], model.config.hidden_size, generator=generator)
                / centroids.shape[1] ** 0.5
            )
            rows = slice(offset + first, offset + first + len(centroids))
            for table in tables:
                table[rows] = 0.5 * table[rows] + 0.017 * centred @ projection


class Examples:
    """Training sequences, drawn: ids and the weight of each token's loss."""

    def __init__(self, coded: Coded, tokenizer: TextTokenizer, recipe: LlmRecipe) -> None:
        self.tokenizer, self.recipe = tokenizer, recipe
        self.varied = [item | {f"{name}_mixed": interleave(*item[name]) for name in VARIANTS} for item in coded.items]
        self.items = self.varied + [item | {"clean_mixed": interleave(*item["clean"])} for item in plain.items()]
        groups, voices = defaultdict(list), defaultdict(list)
        for item in self.items:
            groups[item["row"]["group"]].append(item)
            voices[item["row"]["voice_name"], item["row"]["manner"]].append(item)
        self.groups = [group for group in groups.values() if len(group) > 1]
        self.voices = {key: items for key, items in voices.items() if len(items) > 1}
        self.keys = list(self.voices)
        self.sentences = [s.text for s in texts.english(assets.prepare().wordnet) if not s.held_out]

    def text(self, rng: np.random.Generator) -> tuple[list[int], list[float]]:
        """A sentence alone."""
        ids = self.tokenizer.encode_chat(
            [Turn("assistant", (self.sentences[int(rng.integers(len(self.sentences)))],))], False
        )
        return ids, [1.0] * len(ids)

    def plain(self, rng: np.random.Generator) -> tuple[list[int], list[float]]:
        """A text and its audio, one after the other in either order: the paper's blend of one to one."""
        item = self.items[int(rng.integers(len(self.items)))]
        text, audio = Turn("human", (item["row"]["text"],)), assistant_turn(item["clean_mixed"])
        turns = [text, audio] if rng.random() < 0.7 else [Turn("human", audio.content), Turn("assistant", text.content)]
        ids = self.tokenizer.encode_chat(turns, False)
        return ids, [1.0] * len(ids)

    def clone(self, rng: np.random.Generator) -> tuple[list[int], list[float]]:
        """Another utterance of the same voice in the same manner as the reference."""
        items = self.voices[self.keys[int(rng.integers(len(self.keys)))]]
        reference, target = (items[k] for k in rng.choice(len(items), 2, replace=False))
        return self._answered(
            clone_turns(reference["row"]["text"], reference["clean_mixed"], target["row"]["text"]), target
        )

    def edit(self, rng: np.random.Generator) -> tuple[list[int], list[float]]:
        """Two readings of one sentence by one voice, and the edit that leads from one to the other."""
        group = self.groups[int(rng.integers(len(self.groups)))]
        source, target = (group[k] for k in rng.choice(len(group), 2, replace=False))
        edit = edit_between(source["row"]["manner"], target["row"]["manner"])
        return self._answered(edit_turns(edit, source["row"]["text"], source["clean_mixed"]), target)

    def clean(self, rng: np.random.Generator) -> tuple[list[int], list[float]]:
        """The recording in noise or with pauses, and the recording: denoise and vad. The first thing learned of
        them is to copy."""
        item = self.varied[int(rng.integers(len(self.varied)))]
        edit, source = (Edit(type="denoise"), "noisy") if rng.random() < 0.6 else (Edit(type="vad"), "paused")
        return self._answered(edit_turns(edit, None, item[f"{source}_mixed"]), item)

    def _answered(self, turns: list[Turn], target: dict[str, Any]) -> tuple[list[int], list[float]]:
        ids = self.tokenizer.encode_chat([*turns, assistant_turn(target["clean_mixed"])], False)
        answer = len(target["clean_mixed"]) + 1
        return ids, [CONTEXT_WEIGHT] * (len(ids) - answer) + [1.0] * answer

    def batch(self, rng: np.random.Generator, share: float) -> tuple[Tensor, Tensor]:
        """Ids (B, L) and loss weights (B, L), right-padded; similar lengths share a batch. `share` of the run
        tells the stage."""
        drawn: list[tuple[list[int], list[float]]] = []
        pool = 0
        while pool < self.recipe.tokens * 3:
            draw = self._kind(rng, share)
            ids, weights = draw(rng)
            if len(ids) <= self.recipe.longest:
                drawn.append((ids, weights))
                pool += len(ids)
        drawn.sort(key=lambda pair: len(pair[0]))
        start = int(rng.integers(max(1, len(drawn) * 2 // 3)))
        chosen: list[tuple[list[int], list[float]]] = []
        for pair in drawn[start:]:
            if chosen and len(pair[0]) * (len(chosen) + 1) > self.recipe.tokens:
                break
            chosen.append(pair)
        longest = len(chosen[-1][0])
        ids, weights = torch.zeros(len(chosen), longest, dtype=torch.long), torch.zeros(len(chosen), longest)
        for row, (tokens, loss) in enumerate(chosen):
            ids[row, : len(tokens)], weights[row, : len(loss)] = torch.tensor(tokens), torch.tensor(loss)
        return ids, weights

    def _kind(self, rng: np.random.Generator, share: float) -> Any:
        if share < self.recipe.text_until:
            return self.text
        if share < self.recipe.plain_until:
            return (self.plain, self.clean, self.text)[int(rng.choice(3, p=[0.5, 0.4, 0.1]))]
        return (self.clone, self.edit, self.clean, self.plain)[int(rng.choice(4, p=[0.35, 0.4, 0.15, 0.1]))]


def edit_between(source: str, target: str) -> Edit:
    """The edit that turns one of the teacher's manners into another, e.g. emotion/sad, speed/faster; neutral is a
    removal."""
    if target == "neutral":
        kind = source.partition("/")[0]
        return (
            Edit(type="speed", detail="slower")
            if kind == "speed" and "faster" in source
            else (
                Edit(type="speed", detail="faster") if kind == "speed" else Edit(type=kind, detail="remove")  # type: ignore[arg-type]
            )
        )
    kind, _, detail = target.partition("/")
    return Edit(type=kind, detail=detail)  # type: ignore[arg-type]


def loss_of(model: Step1, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted next-token loss, and the plain mean over the tokens of weight 1 (for the log)."""
    hidden = model.hidden_states(ids[:, :-1])
    wanted, weight = ids[:, 1:].flatten(), weights[:, 1:].flatten()
    used = weight > 0
    entropy = F.cross_entropy(model.lm_head(hidden.flatten(0, 1)[used]).float(), wanted[used], reduction="none")
    weight = weight[used]
    answer = weight >= 1
    return (entropy * weight).sum() / weight.sum(), entropy[answer].mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = pick_device()
    recipe = GPU if device.type == "cuda" else CPU
    tokenizer = TextTokenizer.from_file(text_tokenizer.tokenizer_file())
    model = Step1(config(recipe, tokenizer.vocab_size))
    model.initialise(seed=6)
    start_audio_embedding(model, tokenizer.audio_offset)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, betas=(0.9, 0.95), weight_decay=0.05)
    run = Run("llm", {"model": model, "optimizer": optimizer}, arguments.steps or recipe.steps, arguments.minutes)
    examples = Examples(Coded(), tokenizer, recipe)
    print(
        f"llm: {count_parameters(model):.2f} M parameters, {len(examples.items)} rows, "
        f"{len(examples.groups)} groups on {device}",
        flush=True,
    )
    while run.going:
        ids, weights = (x.to(device) for x in examples.batch(run.rng(), run.step / run.steps))
        set_lr(optimizer, cosine(run.step, run.steps, recipe.lr, recipe.final_lr, warmup=150))
        with torch.autocast(device.type, torch.bfloat16):
            loss, answer = loss_of(model, ids, weights)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.done_step({"loss": loss.detach(), "answer": answer.detach(), "tokens": float((weights > 0).sum())})


if __name__ == "__main__":
    main()
