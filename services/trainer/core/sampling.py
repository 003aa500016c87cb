"""Answers drawn from a language model, many at once, and what the model thinks of them.

Both sides of reinforcement learning use one policy: the model restricted to the grammar of audio tokens (two linguistic
ids, three semantic ids, an end only between groups and at the latest after `max_groups`). Drawing and log-probabilities
agree exactly, so importance ratios start at 1. Knows nothing about rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.codes import AUDIO_VOCAB, GROUP, LINGUISTIC_PER_GROUP, LINGUISTIC_SIZE, Codes
from shared.models.step1 import Step1
from shared.models.step1_attention import KVCache

Ids = npt.NDArray[np.int64]
STATIC_SPAN = 512


@dataclass(frozen=True)
class Vocabulary:
    """Where audio lies among the ids: the id of mixed id 0, and the id that ends a turn."""

    offset: int
    eos: int


@dataclass(frozen=True, eq=False)
class Answer:
    """A drawn answer: mixed ids (groups * 5,), and whether the model ended it itself."""

    mixed: Codes
    ended: bool


def bounds_for(source_tokens: int, stretch: float, extra_groups: int) -> int:
    """The most groups of an answer to a source of so many tokens."""
    return int(source_tokens / GROUP * stretch) + extra_groups


def keeps_shapes(device: torch.device) -> bool:
    """Whether every step of drawing computes all rows over one span, as suits a GPU. A CPU computes only the rows that
    go on, each over its own length."""
    return device.type != "cpu"


@torch.inference_mode()
def draw(
    model: Step1, prompts: Sequence[Ids], max_groups: Sequence[int], vocabulary: Vocabulary, *,
    temperature: float = 1.0, seed: int = 0, slots: int = 64,
) -> list[Answer]:  # fmt: skip
    """One answer per prompt, `slots` side by side in order of length; temperature 0 takes the likeliest token.

    The same seed and slots give the same answers on the same device.
    """
    answers: list[Answer | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + max_groups[i] * GROUP)
    for start in range(0, len(order), slots):
        chosen = order[start : start + slots]
        generator = torch.Generator(device=model.device).manual_seed(seed * 1_000_003 + start)
        drawn = _draw_together(
            model, [prompts[i] for i in chosen], [max_groups[i] for i in chosen], vocabulary, temperature, generator
        )
        for place, answer in zip(chosen, drawn, strict=True):
            answers[place] = answer
    return [answer for answer in answers if answer is not None]


def _draw_together(
    model: Step1, prompts: Sequence[Ids], max_groups: Sequence[int], vocabulary: Vocabulary, temperature: float,
    generator: torch.Generator,
) -> list[Answer]:  # fmt: skip
    count, device = len(prompts), model.device
    is_static = keeps_shapes(device)
    longest = max(len(p) + g * GROUP + 1 for p, g in zip(prompts, max_groups, strict=True))
    capacity = -(-(longest + 1) // STATIC_SPAN) * STATIC_SPAN
    cache = model.new_cache(slots=count, capacity=capacity, zeroed=True)
    hidden = _prefill(model, prompts, cache)
    positions = torch.tensor([len(p) for p in prompts], device=device)
    limit = torch.tensor(max_groups, device=device)
    steps = max(max_groups) * GROUP
    tokens = torch.zeros(count, steps, dtype=torch.long, device=device)
    lengths = torch.zeros(count, dtype=torch.long, device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    done = torch.zeros(count, dtype=torch.bool, device=device)
    furthest = max(len(p) for p in prompts)
    live = torch.arange(count, device=device)  # rows that go on; all of them where shapes are kept
    for step in range(steps):
        picked, is_end = _pick(model, hidden, step, vocabulary, temperature, generator)
        if step % GROUP == 0:
            over = step // GROUP >= limit[live]
            ended[live] |= is_end & ~over & ~done[live]
            done[live] |= is_end | over
            if bool(done.all()):
                break
            if not is_static:
                going = ~done[live]
                live, picked = live[going], picked[going]
        tokens[live, step] = picked
        lengths[live] += ~done[live]
        ids = picked + vocabulary.offset
        if is_static:
            spare = torch.where(done, capacity - 1, positions)  # finished rows write where nobody reads
            span = min(capacity, -(-(furthest + step + 1) // STATIC_SPAN) * STATIC_SPAN)
            hidden = model.decode_static(ids, spare, cache, span)
            positions = torch.where(done, positions, positions + 1)
        else:
            hidden = model.decode(ids, cache, live.tolist())
    rows, kept, own = tokens.cpu().numpy(), lengths.tolist(), ended.tolist()
    return [Answer(rows[i, : kept[i]].astype(np.int32), own[i]) for i in range(count)]


def _prefill(model: Step1, prompts: Sequence[Ids], cache: KVCache) -> Tensor:
    """Hidden states of the prompts' last tokens, (n, hidden); a prompt that is asked again is read once."""
    first: dict[bytes, int] = {}
    states: list[Tensor] = []
    for slot, prompt in enumerate(prompts):
        known = first.setdefault(prompt.tobytes(), slot)
        if known == slot:
            states.append(model.prefill(torch.from_numpy(prompt), cache, slot))
        else:
            cache.restore(slot, 0, cache.snapshot(known, 0, len(prompt)))
            states.append(states[known])
    return torch.stack(states)


def _pick(
    model: Step1, hidden: Tensor, step: int, vocabulary: Vocabulary, temperature: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The next mixed id of every row (n,), and whether the end was drawn instead (n,)."""
    low, high, may_end = _range(step)
    logits = _logits(model, hidden, low, high, may_end, vocabulary)
    choice = _column(logits, temperature, generator)
    return (choice + low).clamp(max=high - 1), choice == high - low


def _column(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A column of every row, drawn by its probability, (n,); the likeliest at temperature 0. A CPU finds it by
    cumulated probabilities, in a twentieth of the time of multinomial; on a GPU such sums differ from time to time."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits / temperature, -1)
    if probabilities.device.type != "cpu":
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
    edges = probabilities.cumsum(-1)
    drawn = torch.rand(len(edges), 1, generator=generator) * edges[:, -1:]
    return torch.searchsorted(edges, drawn, right=True).squeeze(-1).clamp(max=edges.shape[1] - 1)


def _range(step: int) -> tuple[int, int, bool]:
    """The mixed ids [low, high) that may come at a step of an answer, and whether the end may."""
    if step % GROUP < LINGUISTIC_PER_GROUP:
        return 0, LINGUISTIC_SIZE, step % GROUP == 0 and step > 0
    return LINGUISTIC_SIZE, AUDIO_VOCAB, False


def _logits(model: Step1, hidden: Tensor, low: int, high: int, may_end: bool, vocabulary: Vocabulary) -> Tensor:
    """Logits of the choices, (n, high - low), with the end as last column where it may come; float32."""
    start, stop = low + vocabulary.offset, high + vocabulary.offset
    head = model.lm_head
    if type(head) is nn.Linear and not hasattr(head.weight, "full_tensor"):
        rows = head.weight[start:stop]
        if may_end:
            rows = torch.cat([rows, head.weight[vocabulary.eos][None]])
        return F.linear(hidden, rows).float()
    logits: Tensor = head(hidden)
    columns = logits[:, start:stop]
    return (torch.cat([columns, logits[:, vocabulary.eos, None]], -1) if may_end else columns).float()


@dataclass(frozen=True, eq=False)
class Sequences:
    """Prompts with their answers as tensors.

    ids (B, L) padded on the right; starts (B,) of the answers; mask (B, T) of answer tokens with the end token,
    left-aligned; audio (B, T) the same without it; max_groups (B,).
    """

    ids: Tensor
    starts: Tensor
    mask: Tensor
    audio: Tensor
    max_groups: Tensor

    @property
    def at(self) -> Tensor:
        """Positions in `ids` of the tokens before each answer token, where it is predicted, (B, T)."""
        steps = torch.arange(self.mask.shape[1], device=self.ids.device)
        return (self.starts[:, None] - 1 + steps).clamp(max=self.ids.shape[1] - 2)

    def rows(self, chosen: Tensor) -> Sequences:
        """Some of the rows, without the columns that only the others need."""
        longest = int(self.mask[chosen].sum(1).max())
        width = int((self.starts[chosen] + self.mask[chosen].sum(1)).max())
        return Sequences(self.ids[chosen, :width], self.starts[chosen], self.mask[chosen, :longest],
                         self.audio[chosen, :longest], self.max_groups[chosen])  # fmt: skip


def sequences(
    prompts: Sequence[Ids], answers: Sequence[Codes], max_groups: Sequence[int], vocabulary: Vocabulary,
    device: torch.device | str,
) -> Sequences:  # fmt: skip
    """Tensors of prompts and answers; each answer gets its end token."""
    longest = max(len(p) + len(a) + 1 for p, a in zip(prompts, answers, strict=True))
    width = max(len(a) for a in answers) + 1
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask, audio = torch.zeros(len(prompts), width), torch.zeros(len(prompts), width)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = np.concatenate([prompt, np.asarray(answer, np.int64) + vocabulary.offset, [vocabulary.eos]])
        ids[row, : len(whole)] = torch.from_numpy(whole)
        mask[row, : len(answer) + 1] = 1
        audio[row, : len(answer)] = 1
    starts = torch.tensor([len(p) for p in prompts])
    parts = (ids, starts, mask, audio, torch.tensor(list(max_groups)))
    return Sequences(*(part.to(device) for part in parts))


def log_probs(
    model: Step1, batch: Sequences, vocabulary: Vocabulary, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of every answer token under the grammar, and the policy's entropy there, (B, T) each, 0 off mask.

    A token that the grammar forces (the end at the limit) has probability 1.
    """
    hidden = model.hidden_states(batch.ids)
    at = batch.at
    before = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))  # (B, T, hidden)
    wanted = batch.ids.gather(1, at + 1)
    return log_probs_after(model, before, wanted, batch.mask, batch.max_groups, vocabulary, temperature)


def log_probs_after(
    model: Step1, before: Tensor, wanted: Tensor, mask: Tensor, max_groups: Tensor, vocabulary: Vocabulary,
    temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same from hidden states before each answer token (B, T, hidden), the tokens' ids and mask (B, T)."""
    result, entropy = (torch.zeros_like(mask) for _ in range(2))
    steps = torch.arange(mask.shape[1], device=mask.device)
    forced = steps[None] >= max_groups[:, None] * GROUP
    counts = (mask > 0) & ~forced
    kinds = [steps == 0, (steps % GROUP == 0) & (steps > 0), steps % GROUP == 1, steps % GROUP >= LINGUISTIC_PER_GROUP]
    for kind, step in zip(kinds, (0, GROUP, 1, LINGUISTIC_PER_GROUP), strict=True):
        chosen = counts & kind[None]
        if not bool(chosen.any()):
            continue
        low, high, may_end = _range(step)
        logits = _logits(model, before[chosen], low, high, may_end, vocabulary) / temperature
        log_p = torch.log_softmax(logits, -1)
        ids = wanted[chosen]
        column = torch.where(ids == vocabulary.eos, high - low, ids - vocabulary.offset - low)
        result = result.masked_scatter(chosen, log_p.gather(-1, column[:, None]).squeeze(-1))
        entropy = entropy.masked_scatter(chosen, -(log_p.exp() * log_p).sum(-1))
    return result, entropy
