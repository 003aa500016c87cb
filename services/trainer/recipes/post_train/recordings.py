"""The recordings of a post-training: planned from a seed, read by teachers, coded by the checkpoint's own tokenizer.

A group is one sentence of one speaker in several manners; some groups have noise, pauses or a made sound put in. Groups
are written in shards, each whole or absent, so a killed run goes on with the next shard. What a teacher cannot say is
listed in its shard and counted. Knows nothing about what is trained.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from services.trainer.data import degrade
from services.trainer.data import paralinguistic_sounds as sounds
from services.trainer.data.emotion_texts import fitting
from services.trainer.data.rows import reason
from services.trainer.recipes.post_train.material import NEUTRAL, Item, Material, part_of
from services.trainer.recipes.post_train.readers import Reader
from shared.audio.io import Waveform
from shared.codes import Codes
from shared.errors import EditxError, UserError

log = logging.getLogger(__name__)

EMOTIONS = ("happy", "angry", "sad", "fear", "surprised", "excited", "depressed", "coldness")
MANNERS = (
    *(f"emotion/{name}" for name in EMOTIONS),
    *(f"style/{name}" for name in ("whisper", "gentle", "serious", "exaggerated", "child", "older")),
)
SPEEDS = ("speed/faster", "speed/slower", "speed/more faster", "speed/more slower")
Tokenize = Callable[[Waveform], Codes]
Sentences = Callable[[str, bool], Sequence[str]]
"""Language, and whether of the benchmark -> texts."""


@dataclass(frozen=True)
class RecordConfig:
    """How much is recorded.

    `groups` of `manners` emotions or styles beside the neutral reading, of which `teacher_share` are the good
    teacher's (of these `mandarin_share` Mandarin) and the rest the cheap one's; every third also has a speed, every
    third noise and pauses, every third a made sound. `benchmark_groups` neutral readings by held-out voices. Strengths
    of manners lie evenly between `weakest` and `strongest`, in the judges' parts more at the top. A shard of
    `shard_groups` groups is what a kill may cost.
    """

    groups: int = 3000
    benchmark_groups: int = 120
    manners: int = 3
    teacher_share: float = 0.15
    mandarin_share: float = 0.4
    weakest: float = 0.1
    strongest: float = 1.1
    longest_words: int = 12
    shard_groups: int = 10


@dataclass(frozen=True)
class Group:
    """One sentence of one speaker: readings as (manner, strength), the neutral one first."""

    number: int
    reader: int
    text: str
    language: str
    speaker: str
    readings: tuple[tuple[str, float], ...]
    varied: bool = False
    tag: str | None = None
    is_benchmark: bool = False


def plan(config: RecordConfig, readers: Sequence[Reader], sentences: Sentences, seed: int) -> list[Group]:
    """All groups, a function of the seed; `readers[0]` is the good teacher. A text fits the first of its
    emotions. Raises UserError without sentences.
    """
    known: dict[tuple[str, bool], list[str]] = {}
    for language in readers[0].speakers:
        for held_out in (False, True):
            texts = [t for t in sentences(language, held_out) if _length(t, language) <= config.longest_words]
            if not texts:
                raise UserError(f"There are no sentences of the language {language!r}.", code="invalid_dataset")
            known[language, held_out] = texts

    @cache
    def fitting_texts(language: str, held_out: bool, emotion: str | None) -> list[str]:
        texts = known[language, held_out]
        return texts if emotion is None else fitting(texts, emotion)

    groups = []
    for number in range(config.groups + config.benchmark_groups):
        rng = np.random.default_rng((seed, 11, number))
        is_benchmark = number >= config.groups
        reader = 0 if is_benchmark or len(readers) == 1 or rng.random() < config.teacher_share else 1
        mandarin = reader == 0 and "zh" in readers[0].speakers and rng.random() < config.mandarin_share
        language = "zh" if mandarin else "en"
        speakers = (readers[reader].held_out if is_benchmark else readers[reader].speakers)[language]
        readings = [(NEUTRAL, 1.0)]
        if not is_benchmark:
            chosen = [str(m) for m in rng.choice(MANNERS, config.manners, replace=False)]
            draws = 2 if part_of(number) in ("judge_a", "judge_b") else 1  # judges learn from the strong ones
            low, high = config.weakest, config.strongest
            readings += [(m, float(rng.uniform(low, high, draws).max())) for m in chosen]
            readings += [(str(rng.choice(SPEEDS)), 1.0)] if number % 3 == 0 else []
        emotion = EMOTIONS[number % len(EMOTIONS)] if is_benchmark else _first_emotion(readings)
        texts = fitting_texts(language, is_benchmark, emotion)
        tag = None if is_benchmark or number % 3 != 2 else sounds.TAGS[number // 3 % len(sounds.TAGS)]
        groups.append(Group(
            number, reader, texts[int(rng.integers(len(texts)))], language, str(rng.choice(list(speakers))),
            tuple(readings), not is_benchmark and number % 3 == 1, tag, is_benchmark,
        ))  # fmt: skip
    return groups


def nano_sentences(language: str, held_out: bool) -> list[str]:
    """The recipes' sentences: WordNet's usage examples and graded Mandarin ones, split by a hash of the text."""
    from services.trainer.recipes.nano import assets, texts

    found = assets.prepare()
    known = texts.english(found.wordnet) if language == "en" else texts.mandarin(found.hsk)
    return [sentence.text for sentence in known if sentence.held_out == held_out]


def record(
    groups: Sequence[Group], readers: Sequence[Reader], tokenize: Tokenize, folder: Path, config: RecordConfig, *,
    workers: int, progress: Callable[[float, str], None] = lambda fraction, note: None,
) -> dict[str, Any]:  # fmt: skip
    """Write the shards that are missing; how many recordings there are, of how many hours, and what was left out."""
    size = config.shard_groups
    starts = range(0, len(groups), size)
    with ThreadPoolExecutor(workers) as pool:
        for number, start in enumerate(starts):
            target = folder / f"shard-{number:05d}"
            if not target.exists():
                read = partial(_guarded, readers=readers, tokenize=tokenize)
                _write_shard(list(pool.map(read, groups[start : start + size])), target)
            progress((number + 1) / len(starts), f"{min(start + size, len(groups))} of {len(groups)} groups recorded")
    documents = [_document(path) for path in _shards(folder)]
    items = [item for document in documents for item in document["items"]]
    refused = [line for document in documents for line in document["refused"]]
    return {"recordings": len(items), "hours": sum(item["seconds"] for item in items) / 3600,
            "left_out": len(refused), "why": refused[:20]}  # fmt: skip


def load(folder: Path) -> Material:
    """What `record` wrote. Raises UserError when nothing is there."""
    found: dict[bool, list[Item]] = {False: [], True: []}
    for shard in _shards(folder):
        document = _document(shard)
        codes = np.load(shard / "codes.npy")
        for facts in document["items"]:
            found[facts["is_benchmark"]].append(_item(facts, shard / "audio.npy", codes))
    if not found[False]:
        raise UserError(f"There are no recordings in {folder}.", "Run the stage record.", "stage_missing")
    return Material(found[False], found[True])


def _first_emotion(readings: Sequence[tuple[str, float]]) -> str | None:
    """The emotion that the text is to fit."""
    kinds = (manner.partition("/") for manner, _ in readings)
    return next((detail for kind, _, detail in kinds if kind == "emotion"), None)


def _length(text: str, language: str) -> int:
    """Words; three Mandarin characters take about as long as two English words."""
    return len(text.split()) if language == "en" else round(len(text) * 2 / 3)


@dataclass(frozen=True, eq=False)
class _Reading:
    facts: dict[str, Any]
    waveform: Waveform
    codes: dict[str, Codes]


def _guarded(group: Group, *, readers: Sequence[Reader], tokenize: Tokenize) -> list[_Reading] | str:
    """The readings of a group, or why there are none."""
    try:
        return _readings(group, readers[group.reader], tokenize)
    except (EditxError, ValueError) as error:
        return f"group {group.number} ({group.text[:40]!r} by {group.speaker}): {reason(error)}"


def _readings(group: Group, reader: Reader, tokenize: Tokenize) -> list[_Reading]:
    made = []
    for place, (manner, strength) in enumerate(group.readings):
        waveform = reader.say(group.text, group.language, group.speaker, manner, strength, group.number * 100 + place)
        _check(waveform)
        facts = {
            "id": f"g{group.number:05d}x{place}", "group": group.number, "text": group.text, "manner": manner,
            "strength": strength, "language": group.language, "speaker": group.speaker,
            "is_benchmark": group.is_benchmark, "seconds": waveform.duration_s,
            "sample_rate_hz": waveform.sample_rate_hz, "licence": reader.licence, "origin": reader.name,
        }  # fmt: skip
        made.append(_Reading(facts, waveform, {"clean": tokenize(waveform)}))
    first, rng = made[0], np.random.default_rng((group.number, 12))
    if group.varied:
        audio, rate = first.waveform.samples, first.waveform.sample_rate_hz
        noisy = degrade.add_reverb(audio, rate, float(rng.uniform(0.2, 0.6)), rng, wet=float(rng.uniform(0.1, 0.4)))
        noisy = degrade.add_noise(noisy, float(rng.uniform(2, 15)), rng, color=float(rng.uniform(0, 2)))
        first.codes["noisy"] = tokenize(Waveform(np.asarray(np.clip(noisy, -1, 1), np.float32), rate))
        first.codes["paused"] = tokenize(Waveform(degrade.insert_pauses(audio, rate, rng), rate))
    words = list(group.text) if group.language == "zh" else group.text.split()
    if group.tag is not None and len(words) > 2:
        at = int(rng.integers(1, len(words)))

        def say(text: str, manner: str) -> Waveform:
            return reader.say(text, group.language, group.speaker, manner, 1.0, group.number * 100 + 99)

        spoken = sounds.with_sound(words, group.tag, at, group.language, say, rng)
        _check(spoken)
        first.facts["tagged"] = sounds.tagged_text(words, group.tag, at, group.language)
        first.codes["tagged"] = tokenize(spoken)
    return made


def _check(waveform: Waveform) -> None:
    audio = waveform.samples
    if not len(audio) or not np.isfinite(audio).all() or float(np.abs(audio).max()) < 1e-4:
        raise UserError("the reading is empty, silent or holds values that are no numbers", code="invalid_audio")


def _write_shard(groups: Sequence[list[_Reading] | str], target: Path) -> None:
    """One folder of flat arrays and their index; it appears whole."""
    refused = [one for one in groups if isinstance(one, str)]
    for line in refused:
        log.warning("left out: %s", line)
    audio, codes = [np.zeros(0, np.int16)], [np.zeros(0, np.int32)]
    items, at, code_at = [], 0, 0
    for reading in (r for group in groups if not isinstance(group, str) for r in group):
        pcm = np.asarray(np.clip(reading.waveform.samples, -1, 1) * 32767).astype(np.int16)
        spans = {}
        for name, mixed in reading.codes.items():
            spans[name] = (code_at, code_at + len(mixed))
            codes.append(np.asarray(mixed, np.int32))
            code_at += len(mixed)
        items.append(reading.facts | {"audio": (at, at + len(pcm)), "codes": spans})
        audio.append(pcm)
        at += len(pcm)
    partial_folder = target.with_suffix(".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    np.save(partial_folder / "audio.npy", np.concatenate(audio))
    np.save(partial_folder / "codes.npy", np.concatenate(codes))
    document = {"items": items, "refused": refused}
    (partial_folder / "items.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    partial_folder.rename(target)


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-?????"))


def _document(shard: Path) -> dict[str, Any]:
    return dict(json.loads((shard / "items.json").read_text(encoding="utf-8")))


def _item(facts: Mapping[str, Any], audio: Path, codes: Codes) -> Item:
    spans = {name: codes[start:stop] for name, (start, stop) in facts["codes"].items()}

    def read() -> Waveform:
        start, stop = facts["audio"]
        pcm = np.load(audio, mmap_mode="r")[start:stop]
        return Waveform(np.asarray(pcm, np.float32) / np.float32(32767), facts["sample_rate_hz"])

    tagged = (facts["tagged"], spans["tagged"]) if "tagged" in spans else None
    return Item(
        facts["id"], facts["group"], facts["text"], facts["language"], facts["speaker"], facts["manner"],
        spans["clean"], read, facts["licence"], facts["origin"], spans.get("noisy"), spans.get("paused"), tagged,
        facts["strength"],
    )  # fmt: skip
