"""Judges behind HTTP APIs: two recordings and a question in, a verdict out; Gemini's own format and the OpenAI one.

Answers are cached by the content of the question, so a judgement is paid for once. Retries, a rate limit and a budget
are the client's. What is asked follows the benchmark of arXiv 2511.03601: a closed choice of labels for emotion and
style with advice to prefer "none" when unsure, a digit from 1 to 3 for sounds between words.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from services.trainer.core.runs import write_json
from services.trainer.data.teachers import Post, post_json, with_retries
from shared.errors import PermanentError, UserError

NONE = "none"
API_KINDS = ("gemini", "openai")
TASKS = ("emotion", "style", "paralinguistic")


class BudgetSpent(UserError):
    """The judge may cost no more; whoever asks on would do work that nobody judges."""

    default_code = "budget_spent"


@dataclass(frozen=True)
class Question:
    """What is asked about a recording: the task, its labels, the tag that was wanted, the text that is said, and the
    neutral reference's where it is known."""

    task: str
    wanted: str
    text: str
    labels: tuple[str, ...] = ()
    source_text: str = ""

    def prompt(self) -> str:
        """The question in words, with the form of the answer."""
        heard = (
            "You hear two recordings of one voice: the first is what there was before, the second is the result. "
            "Judge the second; the first only shows how the voice sounds by itself.\n"
        )
        if self.task == "paralinguistic":
            return heard + (
                "You inspect synthetic speech for non-verbal sounds. The text below marks each sound in brackets at "
                "the place where it must be heard. Answer 1 if the sounds are missing or all misplaced, 2 if they are "
                "there with any flaw, 3 if every one is clear and in place. A sound that is left out is the usual "
                f'fault: listen for it first.\nText: {self.text}\nAnswer as JSON: {{"score": 1}}'
            )
        choice = ", ".join((*self.labels, NONE))
        wanted = f"no {self.task} at all" if self.wanted == NONE else f'"{self.wanted}"'
        return heard + (
            f"Listen to how the speaker sounds and ignore what the words mean. Which {self.task} is it? Choose one of: "
            f"{choice}. Choose {NONE} when unsure. Also rate from 1 to 10 how clearly the recording expresses "
            f"{wanted} and how natural it sounds.\n"
            f'Answer as JSON: {{"label": "...", "rating": 1, "naturalness": 1}}'
        )


@dataclass(frozen=True)
class Verdict:
    """A judge's answer: a label for emotion and style, a rating from 1 to 10 (1 to 3 for sounds), and naturalness."""

    label: str
    rating: float
    naturalness: float | None = None

    def is_right(self, wanted: str) -> bool:
        return self.label == wanted


class Judge(Protocol):
    """Anything that answers questions about recordings."""

    name: str

    def hears(self, task: str) -> bool:
        """Whether it can answer questions of a task."""
        ...

    def ask(self, question: Question, wav: bytes, source_wav: bytes) -> Verdict:
        """The verdict about `wav`, the result of editing `source_wav`."""
        ...


@dataclass(frozen=True)
class Api:
    """One judge API. `cost_per_call` is an estimate in any currency; `budget` of the same ends the judging."""

    kind: str
    model: str
    key: str
    url: str
    calls_per_minute: float = 60.0
    cost_per_call: float = 0.0
    budget: float = float("inf")
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.kind not in API_KINDS:
            raise UserError(f"There is no judge API of kind {self.kind!r}.", f"Known: {', '.join(API_KINDS)}.",
                            "invalid_training")  # fmt: skip
        if self.calls_per_minute <= 0 or min(self.cost_per_call, self.budget) < 0:
            raise UserError("A judge's rate must be positive, its cost and budget not negative.",
                            code="invalid_training")  # fmt: skip
        if self.budget < float("inf") and not self.cost_per_call:
            raise UserError("A budget for the judge needs the cost of a call.", "Give both, in the same currency.",
                            "invalid_training")  # fmt: skip

    def request(self, prompt: str, recordings: Sequence[bytes]) -> tuple[str, dict[str, Any], dict[str, str]]:
        """URL, JSON document and headers of one question about WAV recordings."""
        audio = [base64.b64encode(wav).decode() for wav in recordings]
        if self.kind == "gemini":
            sounds = [{"inlineData": {"mimeType": "audio/wav", "data": one}} for one in audio]
            parts: list[dict[str, Any]] = [{"text": prompt}, *sounds]
            document = {"contents": [{"role": "user", "parts": parts}],
                        "generationConfig": {"temperature": 0, "responseMimeType": "application/json"}}  # fmt: skip
            url = f"{self.url.rstrip('/')}/models/{self.model}:generateContent"
            return url, document, {"x-goog-api-key": self.key}
        spoken = [{"type": "input_audio", "input_audio": {"data": one, "format": "wav"}} for one in audio]
        content: list[dict[str, Any]] = [{"type": "text", "text": prompt}, *spoken]
        chat = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}],
                "response_format": {"type": "json_object"}}  # fmt: skip
        return f"{self.url.rstrip('/')}/chat/completions", chat, {"Authorization": f"Bearer {self.key}"}

    def text_of(self, body: bytes) -> str:
        """The text of an answer. Raises PermanentError for an answer of another form."""
        try:
            document = json.loads(body)
            if self.kind == "gemini":
                return str(document["candidates"][0]["content"]["parts"][0]["text"])
            return str(document["choices"][0]["message"]["content"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise PermanentError(f"{self.url} gave no verdict ({error}): {body[:200]!r}.", "Look at the model's name."
                                 ) from error  # fmt: skip


class HttpJudge:
    """A judge behind an API, with a cache in a folder. May be called by several threads."""

    def __init__(
        self, api: Api, cache: Path, *, post: Post = post_json, sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.name, self.spent, self.calls = f"{api.kind}:{api.model}", 0.0, 0
        self._api, self._cache, self._post, self._sleep, self._clock = api, cache, post, sleep, clock
        self._lock, self._next = threading.Lock(), 0.0
        cache.mkdir(parents=True, exist_ok=True)

    def hears(self, task: str) -> bool:
        """Emotion, style and sounds."""
        return task in TASKS

    def ask(self, question: Question, wav: bytes, source_wav: bytes) -> Verdict:
        """Raises BudgetSpent, and TransientError and PermanentError as the API fails."""
        prompt = question.prompt()
        parts = [self.name.encode(), prompt.encode(), source_wav, wav]
        key = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
        path = self._cache / f"{key}.json"
        if path.exists():
            return Verdict(**json.loads(path.read_text()))
        url, document, headers = self._api.request(prompt, [source_wav, wav])
        body = with_retries(lambda: self._call(url, document, headers), where=self._api.url, sleep=self._sleep)
        verdict = parse_verdict(self._api.text_of(body), (*question.labels, NONE))
        write_json(path, verdict.__dict__)
        return verdict

    def _call(self, url: str, document: dict[str, Any], headers: dict[str, str]) -> tuple[int, bytes]:
        with self._lock:
            if self.spent + self._api.cost_per_call > self._api.budget:
                raise BudgetSpent(f"The budget of {self._api.budget:g} is spent after {self.calls} calls.",
                                  "Raise it; what was judged is kept.")  # fmt: skip
            self.spent, self.calls = self.spent + self._api.cost_per_call, self.calls + 1
            wait = self._next - self._clock()
            self._next = max(self._clock(), self._next) + 60.0 / self._api.calls_per_minute
        if wait > 0:
            self._sleep(wait)
        return self._post(url, document, headers, self._api.timeout_s)


def parse_verdict(text: str, labels: Sequence[str]) -> Verdict:
    """A verdict out of an answer's text, which may stand in a code fence or be a bare digit. Raises PermanentError."""
    stripped = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    try:
        document = json.loads(stripped)
        if isinstance(document, int | float):
            document = {"score": document}
        rating = float(document.get("rating", document.get("score")))
        label = str(document.get("label", "")).strip().lower()
        natural = document.get("naturalness")
    except (ValueError, TypeError, AttributeError) as error:
        raise PermanentError(f"The judge's answer cannot be read: {text[:120]!r}.") from error
    known = {name.lower(): name for name in labels}
    return Verdict(known.get(label, NONE), rating, None if natural is None else float(natural))
