"""Train the language model: text, then text beside audio, then clones and edits in the chat format.

`python -m services.trainer.recipes.nano.llm`. The stages are shares of one run. Audio embeddings start from the
tokenizers' centroids, so that codes that sound alike begin alike. Two heads of some layers are shown where to look
(`alignment`): one at the piece of text that is being said, one at the token of the source that says the same; a small
model finds the words hours earlier that way (guided attention, arXiv 1710.08969, with the teachers' own alignment).
Some audio tokens of the input are other ones, so that words are read from the text rather than guessed from the sound
so far, which a model of this size otherwise learns by heart.
The loss of an audio token is over the codes that its place in the group allows, which is what decoding samples from.
Needs `codes`, `perturbed`, `sounds` and `plain`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor

from services.trainer.core.batches import replaced
from services.trainer.core.objectives import rivals
from services.trainer.recipes.nano import (
    alignment,
    assets,
    linguistic,
    perturbed,
    plain,
    semantic,
    sounds,
    text_tokenizer,
    texts,
)
from services.trainer.recipes.nano.codes import VARIANTS, Coded, Item
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
from shared.codes import GROUP, GROUP_S, LINGUISTIC_SIZE, interleave
from shared.models.step1 import Step1, Step1Config
from shared.models.step1_attention import Attend
from shared.prompts import TextTokenizer, Turn, assistant_turn, clone_turns, edit_turns
from shared.schemas.edit import Edit

SHOWN_LAYERS = (2, 3, 4)
EDGE_S = 0.05
"""Of the silence beside speech, what vad leaves."""
LONGEST_SILENCE = 12
"""Groups put between two readings, which are silent at their own ends as well."""
TEXT_HEAD, SOURCE_HEAD = 7, 6
"""The two heads of a layer whose positional bias is the flattest."""


@dataclass(frozen=True)
class LlmRecipe:
    steps: int
    tokens: int
    """In a batch, padding counted."""
    lr: float = 3e-3
    final_lr: float = 5e-5
    text_until: float = 0.01
    plain_until: float = 0.12
    """Shares of the steps where the text stage and the stage of text beside audio end."""
    shown_weight: float = 0.3
    """Of the attention that is shown, in the loss."""
    replaced: float = 0.15
    """Share of the input's audio tokens that are others of their kind."""
    teachers: float = 0.3
    """Share of the sequences with audio that are the teacher's readings, at their own speed and others (`perturbed`).
    There are some twenty times more hours of cheap ones, whose codes are easier than the teacher's."""
    longest: int = 800
    hidden: int = 256
    layers: int = 6


CPU = LlmRecipe(steps=6000, tokens=3072)
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


class Example(NamedTuple):
    """A training sequence. ids (L,); learned (L,) marks the tokens that carry a loss; text (L, 3) and source (L, 3) say
    which places the token that FOLLOWS should be read from, -1 for none; exact (L,) marks those that are read as they
    are."""

    ids: np.ndarray
    learned: np.ndarray
    text: np.ndarray
    source: np.ndarray
    exact: np.ndarray


class Batch(NamedTuple):
    """Examples as tensors, (B, L) and (B, L, 3). `given` is what the model reads, `ids` what it is to say next."""

    given: Tensor
    ids: Tensor
    learned: Tensor
    text: Tensor
    source: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(*(part.to(device) for part in self))


class Pool:
    """Readings of one origin, and the pairs among them. Each of `items` has its codes interleaved as well.

    groups: readings of one sentence by one voice, one in each manner; voices: by one voice in one manner; varied: those
    that also come in noise and with pauses.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        self.items: list[Item] = [
            item | {f"{name}_mixed": interleave(*item[name]) for name in VARIANTS if name in item} for item in items
        ]
        self.varied = [item for item in self.items if "noisy" in item]
        groups: dict[int, dict[str, Item]] = defaultdict(dict)
        voices: dict[tuple[str, str], list[Item]] = defaultdict(list)
        for item in self.items:
            groups[item["row"]["group"]][item["row"]["manner"]] = item
            voices[item["row"]["voice_name"], item["row"]["manner"]].append(item)
        self.groups = [list(group.values()) for group in groups.values() if len(group) > 1]
        self.voices = [items for items in voices.values() if len(items) > 1]
        weights = np.array([len(items) for items in self.voices], float) ** 0.5
        self._voice_share = weights / weights.sum()

    def reading(self, rng: np.random.Generator) -> Item:
        """Any one."""
        return self.items[int(rng.integers(len(self.items)))]

    def variant(self, rng: np.random.Generator) -> Item:
        """Any one that comes in noise and with pauses as well."""
        return self.varied[int(rng.integers(len(self.varied)))]

    def same_voice(self, rng: np.random.Generator) -> tuple[Item, Item]:
        """Two readings by one voice in one manner; voices by the root of how often they speak."""
        return _two(self.voices[int(rng.choice(len(self.voices), p=self._voice_share))], rng)

    def same_words(self, rng: np.random.Generator) -> tuple[Item, Item]:
        """Two readings of one sentence by one voice, in two manners."""
        return _two(self.groups[int(rng.integers(len(self.groups)))], rng)


def _unguided(ids: np.ndarray) -> Example:
    """A sequence that is learned as a whole, without being shown where to look."""
    nothing = np.full((len(ids), 3), -1)
    return Example(ids, np.ones(len(ids), bool), nothing, nothing, np.zeros(len(ids), bool))


def _two(items: list[Item], rng: np.random.Generator) -> tuple[Item, Item]:
    first, second = rng.choice(len(items), 2, replace=False)
    return items[first], items[second]


class Examples:
    """Training sequences, drawn."""

    def __init__(self, coded: Coded, tokenizer: TextTokenizer, recipe: LlmRecipe) -> None:
        self.tokenizer, self.recipe = tokenizer, recipe
        self.pools = {"teacher": Pool([*coded.items, *perturbed.items()]), "cheap": Pool(plain.items())}
        plain_readings = {
            item["row"]["index"]: item for item in self.pools["teacher"].items if "speed" not in item["row"]
        }
        self.sounding = [
            (plain_readings[item["row"]["index"]], item | {"clean_mixed": interleave(*item["clean"])})
            for item in sounds.items()
            if item["row"]["index"] in plain_readings
        ]
        """Readings, each with itself where a sound was put in."""
        self.sentences = [s.text for s in texts.english(assets.prepare().wordnet) if not s.held_out]
        processor = sentencepiece.SentencePieceProcessor(model_file=str(text_tokenizer.tokenizer_file()))
        self._places = alignment.TextPlaces([processor.id_to_piece(i) for i in range(tokenizer.audio_offset)])

    def pool(self, rng: np.random.Generator) -> Pool:
        return self.pools["teacher" if rng.random() < self.recipe.teachers else "cheap"]

    def text(self, rng: np.random.Generator) -> Example:
        """A sentence alone."""
        sentence = self.sentences[int(rng.integers(len(self.sentences)))]
        ids = np.array(self.tokenizer.encode_chat([Turn("assistant", (sentence,))], False))
        return _unguided(ids)

    def plain(self, rng: np.random.Generator) -> Example:
        """A text and its audio, one after the other in either order: the paper's blend of one to one."""
        item = self.pool(rng).reading(rng)
        text, audio = Turn("human", (item["row"]["text"],)), assistant_turn(item["clean_mixed"])
        if rng.random() < 0.8:
            return self._answered([text], item)
        ids = self.tokenizer.encode_chat([Turn("human", audio.content), Turn("assistant", text.content)], False)
        return _unguided(np.array(ids))

    def clone(self, rng: np.random.Generator) -> Example:
        """Another utterance of the same voice in the same manner as the reference."""
        reference, target = self.pool(rng).same_voice(rng)
        turns = clone_turns(reference["row"]["text"], reference["clean_mixed"], target["row"]["text"])
        return self._answered(turns, target, given=reference)

    def edit(self, rng: np.random.Generator) -> Example:
        """Two readings of one sentence by one voice, and the edit that leads from one to the other."""
        source, target = self.pool(rng).same_words(rng)
        edit = edit_between(source["row"]["manner"], target["row"]["manner"])
        count = len(target["clean_mixed"])
        heard = alignment.source_times(alignment.token_times(count), target["row"], source["row"])
        places = (
            None if heard is None else alignment.tokens_at(heard, np.arange(count) % GROUP, len(source["clean_mixed"]))
        )
        turns = edit_turns(edit, source["row"]["text"], source["clean_mixed"])
        return self._answered(turns, target, places, given=source)

    def sound(self, rng: np.random.Generator) -> Example:
        """A reading, and itself with a sound where the new text has its tag; an edit where there are none."""
        if not self.sounding:
            return self.edit(rng)
        source, target = self.sounding[int(rng.integers(len(self.sounding)))]
        row, count = target["row"], len(target["clean_mixed"])
        heard = alignment.times_without(alignment.token_times(count), row["at_s"], row["put_in_s"])
        places = alignment.tokens_at(heard, np.arange(count) % GROUP, len(source["clean_mixed"]))
        edit = Edit(type="paralinguistic", target_text=row["text"])
        turns = edit_turns(edit, source["row"]["text"], source["clean_mixed"])
        return self._answered(turns, target, places, given=source)

    def denoise(self, rng: np.random.Generator) -> Example:
        """A recording in noise, and the recording."""
        item = self.pool(rng).variant(rng)
        source = item["noisy_mixed"]
        copied = np.arange(len(item["clean_mixed"]))
        return self._copy(Edit(type="denoise"), source, item, np.where(copied < len(source), copied, -1))

    def vad(self, rng: np.random.Generator) -> Example:
        """A recording with pauses, or two with a silence between them, and what is left of its own groups without."""
        pool = self.pool(rng)
        if rng.random() < 0.4:
            item = pool.variant(rng)
            source, silences = item["paused_mixed"], alignment.put_in(item["pauses"])
        else:
            item, then = pool.same_voice(rng)
            then = pool.reading(rng) if rng.random() < 0.5 else then
            source = np.concatenate([item["clean_mixed"], self._silence(rng, pool), then["clean_mixed"]])
            joint_s = (len(source) - len(then["clean_mixed"])) // GROUP * GROUP_S
            begin_s, end_s = alignment.speech_span(item["row"])[1], joint_s + alignment.speech_span(then["row"])[0]
            silences = [(begin_s + EDGE_S, end_s - EDGE_S)]
        groups = np.arange(len(source)).reshape(-1, GROUP)
        copied = groups[alignment.groups_outside(silences, len(groups))].reshape(-1)
        return self._copy(Edit(type="vad"), source, item | {"clean_mixed": source[copied]}, copied)

    def _silence(self, rng: np.random.Generator, pool: Pool) -> np.ndarray:
        """Up to LONGEST_SILENCE groups of a pause of some recording, over and over."""
        item = pool.variant(rng)
        groups = item["paused_mixed"].reshape(-1, GROUP)
        silent = groups[~alignment.groups_outside(alignment.put_in(item["pauses"]), len(groups))]
        wanted = np.arange(int(rng.integers(LONGEST_SILENCE + 1))) if len(silent) else np.arange(0)
        return np.asarray(silent[wanted % max(1, len(silent))].reshape(-1))

    def _copy(self, edit: Edit, source: np.ndarray, target: Item, copied: np.ndarray) -> Example:
        """An edit that says the source again: each token comes from one place of it (`copied`, -1 for none), so what is
        learned first is to copy, and the source is read as it is."""
        places = np.stack([copied, np.full_like(copied, -1), np.full_like(copied, -1)], 1)
        example = self._answered(edit_turns(edit, None, source), target, places)
        return example._replace(exact=~example.learned)

    def _answered(
        self, turns: list[Turn], target: Item, places: np.ndarray | None = None, given: Item | None = None
    ) -> Example:
        """The prompt and the target as its answer; `places` (count, 3) are the tokens of the source that say what each
        of the target's says, -1 for none.

        `given` is the recording in the prompt where it stands behind its own text: it is learned as well, which nearly
        doubles what a sequence teaches.
        """
        count = len(target["clean_mixed"])
        ids = np.array(self.tokenizer.encode_chat([*turns, assistant_turn(target["clean_mixed"])], False))
        first, begin = len(ids) - 1 - count, int(np.argmax(ids >= self.tokenizer.audio_offset))
        learned = np.arange(len(ids)) >= first
        text, source = np.full((len(ids), 3), -1), np.full((len(ids), 3), -1)
        self._show_text(text, ids, first, target)
        if given is not None:
            learned[begin : begin + len(given["clean_mixed"])] = True
            self._show_text(text, ids, begin, given)
        if places is not None:
            source[first - 1 : first - 1 + count] = np.where(places >= 0, places + begin, -1)
        return Example(ids, learned, text, source, np.zeros(len(ids), bool))

    def _show_text(self, text: np.ndarray, ids: np.ndarray, first: int, item: Item) -> None:
        """Write into `text` which pieces before `first` the reading that starts there says, token by token."""
        count = len(item["clean_mixed"])
        places = self._places(ids[:first].tolist(), item["row"]["text"])
        if places is not None:
            said = np.searchsorted(alignment.char_starts(item["row"]), alignment.token_times(count), side="right") - 1
            token = places[np.maximum(said, 0)][:, None] + np.array([-1, 0, 1])
            text[first - 1 : first - 1 + count] = np.where((token >= places[0]) & (token <= places[-1]), token, -1)

    def batch(self, rng: np.random.Generator, share: float) -> Batch:
        """Sequences of similar length as one right-padded batch. `share` of the run tells the stage."""
        drawn: list[Example] = []
        pool = 0
        while pool < self.recipe.tokens * 3:
            example = self._kind(rng, share)(rng)
            if len(example.ids) <= self.recipe.longest:
                drawn.append(example)
                pool += len(example.ids)
        drawn.sort(key=lambda example: len(example.ids))
        start = int(rng.integers(max(1, len(drawn) * 2 // 3)))
        chosen: list[Example] = []
        for example in drawn[start:]:
            if chosen and len(example.ids) * (len(chosen) + 1) > self.recipe.tokens:
                break
            chosen.append(example)
        length = len(chosen[-1].ids)
        parts = []
        for arrays, filler in zip(zip(*chosen, strict=True), (0, False, -1, -1, True), strict=True):
            wide = np.full((len(chosen), length, *arrays[0].shape[1:]), filler)
            for line, array in enumerate(arrays):
                wide[line, : len(array)] = array
            parts.append(torch.from_numpy(wide))
        *read, exact = parts
        given = replaced(read[0], self.tokenizer.audio_offset, self.recipe.replaced, rng)
        return Batch(torch.where(exact, read[0], given), *read)

    def _kind(self, rng: np.random.Generator, share: float) -> Any:
        if share < self.recipe.text_until:
            return self.text
        if share < self.recipe.plain_until:
            return (self.plain, self.denoise, self.vad, self.text)[int(rng.choice(4, p=[0.6, 0.2, 0.15, 0.05]))]
        kinds = (self.clone, self.edit, self.denoise, self.vad, self.sound, self.plain)
        return kinds[int(rng.choice(6, p=[0.27, 0.27, 0.08, 0.24, 0.08, 0.06]))]


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


class Shown:
    """Attention over whole sequences that also measures how much the shown heads look where they should.

    text and source: (B, L, 3) places, -1 for none, as in `Example`.
    """

    def __init__(self, inner: Attend, model: Step1, text: Tensor, source: Tensor) -> None:
        self._inner, self._slopes = inner, model.alibi.slopes_on(text.device)
        self._places = {TEXT_HEAD: text, SOURCE_HEAD: source}
        length = text.shape[1]
        steps = torch.arange(length, device=text.device)
        distance = steps[:, None] - steps
        self._bias = -distance.clamp(min=0).float().sqrt()
        self._future = distance < 0
        self.losses: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in SHOWN_LAYERS:
            for head, places in self._places.items():
                rows = (places >= 0).any(-1)
                if bool(rows.any()):
                    group = head * k.shape[2] // q.shape[2]
                    self.losses.append(self._loss(q[:, :, head], k[:, :, group], head, places, rows))
        return self._inner(layer, q, k, v)

    def _loss(self, q: Tensor, k: Tensor, head: int, places: Tensor, rows: Tensor) -> Tensor:
        """Minus the log of the attention that falls on the places, q and k (B, L, D), mean over the rows that have
        one."""
        scores = (q @ k.transpose(1, 2)).float() / q.shape[-1] ** 0.5 + self._slopes[head] * self._bias
        scores = scores.masked_fill(self._future, -torch.inf)
        total = scores.logsumexp(-1)
        wanted = scores.gather(-1, places.clamp(min=0)).masked_fill(places < 0, -torch.inf)
        missed: Tensor = total[rows] - wanted[rows].logsumexp(-1)
        return missed.mean()


class Choice(NamedTuple):
    """Tokens with the same rivals: their places (n,) among all, the rivals' rows of the vocabulary (m,), and which of
    the rivals is right (n,)."""

    places: Tensor
    rows: Tensor
    right: Tensor


def choices(ids: Tensor, before: Tensor, offset: int, eos: int) -> dict[str, Choice]:
    """Splits tokens (n,), each with the token before it, by what decoding would let stand in their place.

    Codes compete with their `rivals`, text with text.
    """
    code = ids - offset
    is_end = (ids == eos) & (before >= offset)
    masks = {
        "linguistic": ((code >= 0) & (code < LINGUISTIC_SIZE)) | is_end,
        "semantic": code >= LINGUISTIC_SIZE,
        "text": (code < 0) & ~is_end,
    }
    linguistic, semantic = rivals(offset, eos, ids.device)
    rows = {"linguistic": linguistic, "semantic": semantic, "text": torch.arange(offset, device=ids.device)}
    right = {
        "linguistic": torch.where(is_end, LINGUISTIC_SIZE, code),
        "semantic": code - LINGUISTIC_SIZE,
        "text": ids,
    }
    found = {name: mask.nonzero()[:, 0] for name, mask in masks.items()}
    return {name: Choice(places, rows[name], right[name][places]) for name, places in found.items() if len(places)}


def loss_of(model: Step1, offset: int, batch: Batch, shown_weight: float) -> dict[str, Tensor]:
    """Losses of a batch of tensors: "loss" to minimise, and per token "linguistic", "semantic", "text" and "shown"."""
    ids, given = batch.ids, batch.given[:, :-1]
    attend = Shown(model.whole_sequences(given), model, batch.text[:, :-1], batch.source[:, :-1])
    hidden = model.hidden_states(given, attend=attend)
    used = batch.learned[:, 1:]
    wanted, states = ids[:, 1:][used], hidden[used]
    report, total = {}, states.new_zeros((), dtype=torch.float32)
    for name, choice in choices(wanted, ids[:, :-1][used], offset, model.config.eos_token_id).items():
        logits = states[choice.places] @ model.lm_head.weight[choice.rows].T  # type: ignore[index]
        entropy = F.cross_entropy(logits.float(), choice.right)
        report[name] = entropy.detach()
        total = total + entropy * len(choice.places) / len(wanted)
    if attend.losses:
        shown = torch.stack(attend.losses).mean()
        report["shown"] = shown.detach()
        total = total + shown_weight * shown
    return report | {"loss": total}


def main() -> None:
    arguments = training_options(__doc__).parse_args()
    device, recipe = begin(arguments, CPU, GPU)
    tokenizer = TextTokenizer.from_file(text_tokenizer.tokenizer_file())
    model = Step1(config(recipe, tokenizer.vocab_size))
    model.initialise(seed=6)
    start_audio_embedding(model, tokenizer.audio_offset)
    model.to(device)
    optimizer = Optimizer(model, recipe.lr, outside=("embed", "lm_head"), betas=(0.9, 0.95), weight_decay=0.05)
    parts = {"model": model, "optimizers": optimizer}
    run = Run("llm", parts, arguments.steps or recipe.steps, arguments.minutes)
    examples = Examples(Coded(), tokenizer, recipe)
    rows = ", ".join(f"{len(pool.items)} {name} rows" for name, pool in examples.pools.items())
    print(f"llm: {count_parameters(model):.2f} M parameters, {rows} on {device}", flush=True)
    while run.going:
        batch = examples.batch(run.rng(), run.step / run.steps).to(device)
        set_lr(optimizer, cosine(run.step, run.steps, recipe.lr, recipe.final_lr, warmup=150))
        with products(device):
            losses = loss_of(model, tokenizer.audio_offset, batch, recipe.shown_weight)
        optimizer.zero_grad()
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.done_step({name: value.detach() for name, value in losses.items()} | {"tokens": float(batch.learned.sum())})


if __name__ == "__main__":
    main()
