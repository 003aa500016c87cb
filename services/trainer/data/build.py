"""Builders: raw material to rows, one per kind of set in arXiv 2511.03601, section 3 and 6.

Each is a generator of rows or of reasons why one was left out, so that a bad recording never stops a build silently or
loudly unless asked. Rendering and tokenising are behind small interfaces. Knows nothing about folders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from services.trainer.data import degrade
from services.trainer.data import paralinguistic_sounds as sounds
from services.trainer.data.manifest import Refused
from services.trainer.data.rows import Row, Side, hash_audio
from services.trainer.data.teachers import Teacher
from services.trainer.data.work import Work
from shared.audio.io import Waveform
from shared.codes import Codes
from shared.errors import UserError
from shared.inference.port import Inference
from shared.schemas.edit import Edit

Tokenize = Callable[[Waveform], Codes]
Margin = Callable[[Waveform, Waveform, str], float]
"""Neutral and expressive recording and category -> 1 to 10."""

SPEED_FACTORS = {"faster": 1.25, "slower": 0.8, "more faster": 1.5, "more slower": 0.65}
AT_ONCE = Work()
_TAGS = re.compile(r"\s*\[[^\]]+\]\s*")


@dataclass(frozen=True)
class Sentence:
    """A text to be said. `manner` is the emotion or style that it fits ("emotion/happy"), if it was written for one."""

    text: str
    language: str
    manner: str | None = None


@dataclass(frozen=True, eq=False)
class Recording:
    """A recording that is there already."""

    id: str
    text: str
    language: str
    speaker: str
    waveform: Waveform
    licence: str
    origin: str


def tokenize_with(inference: Inference) -> Tokenize:
    """The model "tokenizer" as a function of recordings."""
    from shared.codes import interleave

    def tokenize(waveform: Waveform) -> Codes:
        found = inference.infer(
            "tokenizer", {"audio": waveform.samples}, parameters={"sample_rate_hz": waveform.sample_rate_hz}
        )
        return interleave(found["linguistic"], found["semantic"])

    return tokenize


def side(text: str, waveform: Waveform, tokenize: Tokenize, work: Work) -> Side:
    """A recording as one side of a row. Raises UserError for one that is empty, silent or holds NaN."""
    samples = waveform.samples
    if not len(samples) or not np.isfinite(samples).all() or float(np.abs(samples).max()) < 1e-4:
        raise UserError("the recording is empty, silent or holds values that are no numbers", code="invalid_audio")
    sha256 = hash_audio(samples, waveform.sample_rate_hz)
    return Side(text=text, mixed=tokenize(waveform), audio=work.audio(waveform, sha256), sha256=sha256)


def zero_shot(
    teacher: Teacher, sentences: Sequence[Sentence], speakers: Mapping[str, Sequence[str]], tokenize: Tokenize, *,
    count: int, seed: int = 0, work: Work = AT_ONCE,
) -> Iterator[Row | Refused]:  # fmt: skip
    """Clones: a speaker (of the language) says one sentence as the reference and another as the answer.

    Raises UserError for a language of one sentence.
    """
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        target = sentences[int(rng.integers(len(sentences)))]
        same = [s for s in sentences if s.language == target.language and s.text != target.text]
        if not same:
            raise UserError(f"There is one sentence of the language {target.language!r}: a clone needs two.",
                            code="invalid_dataset")  # fmt: skip
        speaker = str(rng.choice(list(speakers[target.language])))
        reference = same[int(rng.integers(len(same)))]

        def make(number: int = number, target: Sentence = target, reference: Sentence = reference,
                 speaker: str = speaker) -> Row:  # fmt: skip
            spoken = [teacher.say(s.text, s.language, speaker, "neutral") for s in (reference, target)]
            return Row(
                id=f"tts-{seed}-{number:06d}", edit=Edit(type="clone", target_text=target.text),
                source=side(reference.text, spoken[0], tokenize, work),
                target=side(target.text, spoken[1], tokenize, work),
                speaker=speaker, language=target.language, licence=teacher.licence, origin=teacher.name,
            )  # fmt: skip

        yield work.row(number + 1, f"tts-{seed}-{number:06d}", make)


def triplets(
    teacher: Teacher, sentences: Sequence[Sentence], speakers: Mapping[str, Sequence[str]], tokenize: Tokenize,
    margin: Margin | None, *, count: int, seed: int = 0, removal_share: float = 0.15,
    work: Work = AT_ONCE,
) -> Iterator[Row | Refused]:  # fmt: skip
    """Large-margin triplets (text, neutral, expressive): one speaker, one text that fits the manner, two readings.

    A share of them is turned round into removals. Raises UserError for a sentence without a manner.
    """
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        sentence = sentences[int(rng.integers(len(sentences)))]
        if sentence.manner is None:
            raise UserError(f"The sentence {sentence.text!r} fits no manner.", "Give each text its emotion or style.")
        kind, _, detail = sentence.manner.partition("/")
        speaker = str(rng.choice(list(speakers[sentence.language])))
        turned = bool(rng.random() < removal_share)

        def make(number: int = number, sentence: Sentence = sentence, speaker: str = speaker, kind: str = kind,
                 detail: str = detail, turned: bool = turned) -> Row:  # fmt: skip
            neutral = teacher.say(sentence.text, sentence.language, speaker, "neutral")
            expressive = teacher.say(sentence.text, sentence.language, speaker, sentence.manner or "")
            found = margin(neutral, expressive, f"{kind} {detail}") if margin else None
            sides = [side(sentence.text, neutral, tokenize, work), side(sentence.text, expressive, tokenize, work)]
            source, target = sides[::-1] if turned else sides
            edit = Edit.model_validate({"type": kind, "detail": "remove" if turned else detail})
            return Row(
                id=f"{kind}-{seed}-{number:06d}", edit=edit, source=source, target=target, speaker=speaker,
                language=sentence.language, licence=teacher.licence, origin=teacher.name, margin=found,
            )  # fmt: skip

        yield work.row(number + 1, f"{kind}-{seed}-{number:06d}", make)


def paralinguistic(
    tagged: Iterable[Recording | Refused], teacher: Teacher, tokenize: Tokenize, *, work: Work = AT_ONCE
) -> Iterator[Row | Refused]:  # fmt: skip
    """Quadruplets from a corpus with [tags] in its texts (NVSpeech's layout): the teacher says the text without them.

    The answer is the corpus's own recording, which is also what a cloning teacher hears of the voice where it has no
    other; there is no margin filter. Refused recordings are passed on.
    """
    for number, recording in enumerate(tagged, start=1):
        if isinstance(recording, Refused):
            yield recording
            continue

        def make(recording: Recording = recording) -> Row:
            clean = without_tags(recording.text)
            if clean == recording.text.strip():
                raise UserError("its text holds no [tag]", code="bad_row")
            spoken = teacher.say(clean, recording.language, recording.speaker, "neutral", reference=recording.waveform)
            return Row(
                id=f"para-{recording.id}", edit=Edit(type="paralinguistic", target_text=recording.text),
                source=side(clean, spoken, tokenize, work),
                target=side(recording.text, recording.waveform, tokenize, work),
                speaker=recording.speaker, language=recording.language, licence=recording.licence,
                origin=f"{recording.origin}+{teacher.name}",
            )  # fmt: skip

        yield work.row(number, f"para-{recording.id}", make)


def made_sounds(
    teacher: Teacher, sentences: Sequence[Sentence], speakers: Mapping[str, Sequence[str]], tokenize: Tokenize, *,
    count: int, seed: int = 0, work: Work = AT_ONCE,
) -> Iterator[Row | Refused]:  # fmt: skip
    """Quadruplets without a tagged corpus: the teacher's sentence, and the same with a made sound between two phrases.

    The sounds are those of `paralinguistic_sounds`, one kind after the other.
    """
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        sentence = sentences[int(rng.integers(len(sentences)))]
        speaker, tag = str(rng.choice(list(speakers[sentence.language]))), sounds.TAGS[number % len(sounds.TAGS)]

        def make(number: int = number, sentence: Sentence = sentence, speaker: str = speaker, tag: str = tag,
                 rng: np.random.Generator = rng) -> Row:  # fmt: skip
            language = sentence.language
            words = list(sentence.text) if language == "zh" else sentence.text.split()
            if len(words) < 2:
                raise UserError("one word leaves no place for a sound", code="bad_row")
            at = int(rng.integers(1, len(words)))
            say: sounds.Say = lambda text, manner: teacher.say(text, language, speaker, manner)  # noqa: E731
            spoken = sounds.with_sound(words, tag, at, language, say, rng)
            tagged = sounds.tagged_text(words, tag, at, language)
            return Row(
                id=f"sound-{seed}-{number:06d}", edit=Edit(type="paralinguistic", target_text=tagged),
                source=side(sentence.text, say(sentence.text, "neutral"), tokenize, work),
                target=side(tagged, spoken, tokenize, work),
                speaker=speaker, language=language, licence=teacher.licence, origin=f"{teacher.name}+made-sounds",
            )  # fmt: skip

        yield work.row(number + 1, f"sound-{seed}-{number:06d}", make)


def without_tags(text: str) -> str:
    """A text without its [tags] and with single spaces."""
    return " ".join(_TAGS.sub(" ", text).split())


def simple_edits(
    recordings: Iterable[Recording | Refused], tokenize: Tokenize, *,
    kinds: Sequence[str] = ("speed", "denoise", "vad"), seed: int = 0, work: Work = AT_ONCE,
) -> Iterator[Row | Refused]:  # fmt: skip
    """Speed (tempo changed at the same pitch), denoise (noise and reverb put on) and vad (silences put in, cut out).

    Refused recordings are passed on.
    """
    for place, recording in enumerate(recordings):
        if isinstance(recording, Refused):
            yield recording
            continue
        for kind in kinds:
            rng = np.random.default_rng((seed, place, kinds.index(kind)))

            def make(recording: Recording = recording, kind: str = kind, rng: np.random.Generator = rng) -> Row:
                edit, before, after = _simple(kind, recording.waveform, rng)
                return Row(
                    id=f"{kind}-{recording.id}", edit=edit, source=side(recording.text, before, tokenize, work),
                    target=side(recording.text, after, tokenize, work), speaker=recording.speaker,
                    language=recording.language, licence=recording.licence, origin=recording.origin,
                )  # fmt: skip

            yield work.row(place + 1, f"{kind}-{recording.id}", make)


def prompts(
    recordings: Iterable[Recording | Refused], manners: Sequence[str], tokenize: Tokenize, *, work: Work = AT_ONCE
) -> Iterator[Row | Refused]:  # fmt: skip
    """Edits that nobody has answered, for candidates and PPO: each recording and one of the manners, in turn.

    The source stands in the answer's place, whose words and length it has; nothing can be learned from it. Refused
    recordings are passed on.
    """
    for place, recording in enumerate(recordings):
        if isinstance(recording, Refused):
            yield recording
            continue
        kind, _, detail = manners[place % len(manners)].partition("/")

        def make(recording: Recording = recording, kind: str = kind, detail: str = detail) -> Row:
            source = side(recording.text, recording.waveform, tokenize, work)
            return Row(
                id=f"prompt-{recording.id}", edit=Edit.model_validate({"type": kind, "detail": detail}),
                source=source, target=source, speaker=recording.speaker, language=recording.language,
                licence=recording.licence, origin=f"{recording.origin}, unanswered",
            )  # fmt: skip

        yield work.row(place + 1, f"prompt-{recording.id}", make)


def _simple(kind: str, waveform: Waveform, rng: np.random.Generator) -> tuple[Edit, Waveform, Waveform]:
    """The edit, its source and its target, made from one recording."""
    audio, rate = waveform.samples, waveform.sample_rate_hz
    if kind == "speed":
        detail = str(rng.choice(list(SPEED_FACTORS)))
        changed = degrade.change_tempo(audio, rate, SPEED_FACTORS[detail])
        return Edit(type="speed", detail=detail), waveform, Waveform(changed, rate)
    if kind == "denoise":
        noisy = degrade.add_reverb(audio, rate, float(rng.uniform(0.2, 0.6)), rng, wet=float(rng.uniform(0.1, 0.5)))
        noisy = degrade.add_noise(noisy, float(rng.uniform(0, 15)), rng, color=float(rng.uniform(0, 2)))
        return Edit(type="denoise"), Waveform(np.clip(noisy, -1, 1), rate), waveform
    if kind == "vad":
        paused = degrade.insert_pauses(audio, rate, rng)
        return Edit(type="vad"), Waveform(paused, rate), Waveform(degrade.remove_silence(audio, rate), rate)
    raise UserError(f"There is no simple edit {kind!r}.", "Known: speed, denoise, vad.", "invalid_training")
