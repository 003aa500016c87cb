"""A text spoken with a reference's voice, as a stream: tokens come from the language model while the decoder speaks.

No job is made of it: the answer is the audio, and leaving ends the work. Knows nothing about HTTP.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.gateway.backend import Backend
from shared.audio.io import Waveform
from shared.codes import GROUP_S, interleave
from shared.errors import PermanentError
from shared.inference.port import given
from shared.prompts import clone_turns
from shared.tags import check_text_tags

SAMPLE_RATE_HZ = 24_000
PRIORITY, FIRST_PRIORITY = 1, 2  # the first chunk of a stream overtakes later ones
LONGEST_S = 60.0
SECONDS_PER_CHARACTER = {"wide": 0.45, "narrow": 0.14}

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Words:
    """What to say, with which voice, and how."""

    text: str
    reference: Waveform
    reference_text: str
    seed: int
    temperature: float | None = None
    steps: int = 10
    cfg: float | None = None


def speak(backend: Backend, words: Words, cancelled: Callable[[], bool]) -> Iterator[Samples]:
    """The audio at 24 kHz, in pieces as they are ready. The work stops once `cancelled`, with RequestCancelled.

    Raises UserError for texts that cannot be spoken, PermanentError where nothing came.
    """
    text, inference = check_text_tags(words.text), backend.inference
    codes = inference.infer(
        "tokenizer",
        {"audio": words.reference.samples},
        parameters={"sample_rate_hz": words.reference.sample_rate_hz},
        cancelled=cancelled,
        priority=FIRST_PRIORITY,
    )
    prompt_mixed = interleave(codes["linguistic"], codes["semantic"])
    prompt = np.asarray(backend.encode(clone_turns(words.reference_text, prompt_mixed, text)), np.int64)
    reference = {
        "prompt_mixed": prompt_mixed,
        "prompt_mel": codes["prompt_mel"],
        "speaker_embedding": codes["speaker_embedding"],
    }
    pieces = inference.stream(
        "llm",
        {"prompt": prompt},
        parameters=given(temperature=words.temperature, seed=words.seed, max_groups=max_groups(text)),
        cancelled=cancelled,
        priority=PRIORITY,
    )
    session, spoken = secrets.token_hex(16), False
    for index, mixed in enumerate(_ended(piece["mixed"].astype(np.int32) for piece in pieces)):
        if not len(mixed) and not index:
            break
        for answer in inference.stream(
            "decoder",
            {"mixed": mixed, **(reference if index == 0 else {})},
            parameters=given(
                session=session, index=index, last=not len(mixed), steps=words.steps, cfg=words.cfg, seed=words.seed
            ),
            cancelled=cancelled,
            priority=PRIORITY if spoken else FIRST_PRIORITY,
        ):
            audio = answer["audio"].astype(np.float32).reshape(-1)
            if len(audio):
                spoken = True
                yield audio
    if not spoken:
        raise PermanentError("The language model wrote no audio.", "Try another seed.", "no_audio_generated")


def max_groups(text: str) -> int:
    """The most token groups (120 ms each) that a text may take: three times as long as saying it."""
    wide = sum(ord(character) > 0x2E80 for character in text)
    seconds = wide * SECONDS_PER_CHARACTER["wide"] + (len(text) - wide) * SECONDS_PER_CHARACTER["narrow"]
    return int(min(5.0 + 3.0 * seconds, LONGEST_S) / GROUP_S)


def _ended(pieces: Iterator[npt.NDArray[np.int32]]) -> Iterator[npt.NDArray[np.int32]]:
    """The pieces that hold something, and an empty one at the end."""
    for piece in pieces:
        if len(piece):
            yield piece
    yield np.zeros(0, np.int32)
