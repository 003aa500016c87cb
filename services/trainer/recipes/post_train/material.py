"""What a post-training starts from: recordings with codes, in groups of one voice and one text said in several manners.

Parts of it are set aside by group, so that judges, preferences and training never see the same recordings. Knows
nothing about training, nor about who read the recordings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from services.trainer.data.manifest import Dataset, Refused, collect
from services.trainer.data.rows import Row, Side
from shared.audio.io import Waveform
from shared.codes import GROUP, Codes
from shared.schemas.edit import Edit

Part = Literal["judge_a", "judge_b", "held_out", "prompts", "sft"]
NEUTRAL = "neutral"
CLEAR = 0.6
"""Weaker readings do not tell a judge or a reward model what their label sounds like; margins are learned from all."""
_TENTHS: dict[int, Part] = {0: "judge_a", 1: "judge_b", 2: "held_out", 3: "prompts"}


@dataclass(frozen=True, eq=False)
class Item:
    """One recording: codes, words, voice, manner ("neutral", "emotion/happy"), and the samples when they are wanted.

    `strength` is how much of its manner the reader was asked for.

    Where the material has them: `noisy` and `paused` are the codes of the recording in noise and with pauses put in,
    `tagged` is its text with a [tag] and the codes of a reading with that sound.
    """

    id: str
    group: int
    text: str
    language: str
    speaker: str
    manner: str
    mixed: Codes
    audio: Callable[[], Waveform]
    licence: str
    origin: str
    noisy: Codes | None = None
    paused: Codes | None = None
    tagged: tuple[str, Codes] | None = None
    strength: float = 1.0


@dataclass(frozen=True)
class Material:
    """Items for training and, of other voices and texts, for the benchmark."""

    training: Sequence[Item]
    benchmark: Sequence[Item]

    def part(self, part: Part) -> list[Item]:
        """The items of one part: groups are dealt out by tenths."""
        return [item for item in self.training if part_of(item.group) == part]

    def pairs(self, part: Part, kinds: Sequence[str] = ("emotion", "style", "speed")) -> list[tuple[Item, Item]]:
        """Neutral and expressive items of one group, in the order of the material."""
        neutral = {item.group: item for item in self.part(part) if item.manner == NEUTRAL}
        return [
            (neutral[item.group], item) for item in self.part(part)
            if item.group in neutral and item.manner.partition("/")[0] in kinds
        ]  # fmt: skip

    def row(self, source: Item, target: Item, edit: Edit, margin: float | None = None) -> Row:
        """A row from one item to another."""
        return Row(
            id=f"{source.id}-{target.id}-{str(edit).replace(' ', '-')}", edit=edit, margin=margin,
            source=Side(text=source.text, mixed=source.mixed), target=Side(text=target.text, mixed=target.mixed),
            speaker=source.speaker, language=source.language, licence=source.licence, origin=source.origin,
        )  # fmt: skip

    def rehearsal(self, count: int, seed: int) -> list[Row]:
        """Speed, denoise and vad edits, so that a model that learns emotions and styles does not forget them."""
        made = [
            self.row(source, target, edit_towards(target.manner)) for source, target in self.pairs("sft", ("speed",))
        ]
        for item in self.part("sft"):
            for kind, codes in (("denoise", item.noisy), ("vad", item.paused)):
                if codes is not None:
                    before = replace(item, id=f"{item.id}{kind}", mixed=codes)
                    made.append(self.row(before, item, Edit.model_validate({"type": kind})))
        order = np.random.default_rng((seed, 6)).permutation(len(made))[:count]
        return [made[k] for k in order]

    def sounds(self, count: int, seed: int) -> list[Row]:
        """Paralinguistic edits: from the plain reading to one with a sound in it; no margin filter, as in the paper."""
        made = []
        for item in self.part("sft"):
            if item.tagged is not None:
                text, codes = item.tagged
                after = replace(item, id=f"{item.id}sound", text=text, mixed=codes, origin=f"{item.origin}+made-sounds")
                edit = Edit(type="paralinguistic", target_text=text)
                made.append(self.row(item, after, edit).model_copy(update={"origin": after.origin}))
        order = np.random.default_rng((seed, 7)).permutation(len(made))[:count]
        return [made[k] for k in order]

    def contrasts(self, count: int, seed: int) -> list[Row]:
        """Preferences that need no judge, in turn: the reading that the edit asks for against one in another manner,
        and against itself with a stretch of another recording in it."""
        groups: dict[int, list[Item]] = defaultdict(list)
        for item in self.part("sft"):
            groups[item.group].append(item)
        pairs = [(s, t) for s, t in self.pairs("sft", ("emotion", "style")) if t.strength >= CLEAR]
        everything, rng = self.part("sft"), np.random.default_rng((seed, 8))
        made = []
        for number, place in enumerate(rng.permutation(len(pairs))[:count]):
            source, target = pairs[place]
            others = [item for item in groups[target.group] if item.manner != target.manner]
            if number % 2:
                rejected = _spliced(target.mixed, everything[int(rng.integers(len(everything)))].mixed, rng)
            else:
                rejected = others[int(rng.integers(len(others)))].mixed
            row = self.row(source, target, edit_towards(target.manner))
            update = {"id": f"{row.id}-contrast", "rejected": Side(text=target.text, mixed=rejected),
                      "rated_by": "the teacher"}  # fmt: skip
            made.append(row.model_copy(update=update))
        return made

    def clones(self, count: int, seed: int) -> Dataset:
        """Neutral clones: reference and answer are two texts of one voice."""
        voices: dict[str, list[Item]] = defaultdict(list)
        for item in self.part("sft"):
            if item.manner == NEUTRAL:
                voices[item.speaker].append(item)
        choices = [items for items in voices.values() if len(items) > 1]

        def rows() -> list[Row | Refused]:
            rng = np.random.default_rng((seed, 5))
            made: list[Row | Refused] = []
            for _ in range(count if choices else 0):
                items = choices[int(rng.integers(len(choices)))]
                reference, target = (items[int(k)] for k in rng.choice(len(items), 2, replace=False))
                made.append(self.row(reference, target, Edit(type="clone", target_text=target.text)))
            return made

        return collect("clones", rows(), on_bad="skip")


def _spliced(mixed: Codes, other: Codes, rng: np.random.Generator) -> Codes:
    """The codes with a quarter to a half of their groups taken from another recording."""
    groups = len(mixed) // GROUP
    length = min(max(1, int(groups * rng.uniform(0.25, 0.5))), len(other) // GROUP)
    into, start = int(rng.integers(groups - length + 1)), int(rng.integers(len(other) // GROUP - length + 1))
    made = np.array(mixed)
    made[into * GROUP : (into + length) * GROUP] = np.asarray(other)[start * GROUP : (start + length) * GROUP]
    return made


def part_of(group: int) -> Part:
    """What a group is kept for."""
    return _TENTHS.get(group % 10, "sft")


def edit_towards(manner: str) -> Edit:
    """The edit that makes a neutral recording so: "emotion/happy" -> emotion happy."""
    kind, _, detail = manner.partition("/")
    return Edit.model_validate({"type": kind, "detail": detail})
