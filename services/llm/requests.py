"""What an engine is asked for and gives back: generations, their drafts and outcomes, and the line in which they wait.

Shared by the engines of this service. Knows nothing about what runs the model.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from services.llm.sampling import Sampler, SamplingSettings, find_loop
from shared.codes import GROUP, Codes
from shared.errors import UserError
from shared.inference.port import DeadlineExceeded, InferenceUnavailable, RequestCancelled

Collapse = Literal["loop", "no_end"]
LOOP_CHECK_GROUPS = 8
IDLE_S = 0.5
"""How long an engine with nothing to do waits before it looks again."""


@dataclass(frozen=True)
class EngineSettings:
    """Bounds of an engine. `context`: prompt and result of one sequence together, in tokens."""

    slots: int = 16
    context: int = 8192
    queue_limit: int = 256
    prefix_cache_tokens: int = 16384
    stream_groups: int = 5


@dataclass(frozen=True, eq=False)
class Outcome:
    """A finished sequence: mixed ids (n,), how many attempts it took, and why the last one counts as collapsed."""

    mixed: Codes
    attempts: int
    collapse: Collapse | None


def _never() -> bool:
    return False


@dataclass(eq=False)
class Generation:
    """A submitted sequence, seen from outside: wait for the outcome, or read pieces as they come, or cancel."""

    prompt: npt.NDArray[np.int64]
    settings: SamplingSettings
    deadline: float | None = None
    cancelled: Callable[[], bool] = _never
    priority: int = 0
    streams: bool = False
    against: npt.NDArray[np.int64] | None = None
    """Another prompt, which the draws are guided away from."""
    _pieces: queue.SimpleQueue[object] = field(default_factory=queue.SimpleQueue)
    _given_up: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Stop the work soon; readers get RequestCancelled. Safe at any time."""
        self._given_up.set()

    def pieces(self) -> Iterator[Codes | Outcome]:
        """Whole groups of mixed ids as they are drawn (only when `streams`), at the end the Outcome.

        Raises RequestCancelled, DeadlineExceeded, or what failed. Closing the iterator cancels.
        """
        try:
            while True:
                piece = self._pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                if isinstance(piece, Outcome):
                    yield piece
                    return
                assert isinstance(piece, np.ndarray)
                yield piece
        finally:
            self.cancel()

    def result(self) -> Outcome:
        """Wait for the end. Raises as `pieces` does."""
        *_, outcome = self.pieces()
        assert isinstance(outcome, Outcome)
        return outcome

    @property
    def refusal(self) -> Exception | None:
        """Why the sequence should not be worked on any more."""
        if self._given_up.is_set() or self.cancelled():
            return RequestCancelled("The generation was cancelled.")
        if self.deadline is not None and time.monotonic() > self.deadline:
            return DeadlineExceeded("The deadline passed before all audio tokens were there.")
        return None

    def put(self, piece: object) -> None:
        self._pieces.put(piece)

    @property
    def prompts(self) -> list[npt.NDArray[np.int64]]:
        """What has to be read, each in a slot of its own: the prompt, and the one it is guided away from."""
        return [self.prompt] if self.against is None else [self.prompt, self.against]

    def fit(self, vocabulary: int, context: int) -> None:
        """Cap the result's length by what the context leaves. Raises UserError for a prompt that cannot be used."""
        prompt, settings = max(self.prompts, key=len), self.settings
        for one in self.prompts:
            if one.ndim != 1 or not len(one) or one.min() < 0 or one.max() >= vocabulary:
                raise UserError(
                    "The prompt must be a list of ids of the checkpoint's vocabulary.",
                    "Encode it with the text tokenizer of the same checkpoint.", "invalid_prompt",
                )  # fmt: skip
        room = (context - len(prompt) - 1) // GROUP
        if room < settings.min_groups:
            raise UserError(
                f"The prompt of {len(prompt)} tokens leaves no room for {settings.min_groups * GROUP} more in a "
                f"context of {context}.", "Use a shorter recording, or raise EDITX_LLM_CONTEXT.", "prompt_too_long",
            )  # fmt: skip
        self.settings = replace(settings, max_groups=min(settings.max_groups, room))


class Draft:
    """One attempt at a generation: what was drawn so far and what of it was handed out."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.sampler = Sampler(generation.settings)
        self.sent_groups = 0

    def collapse(self, ended: bool) -> Collapse | None:
        """Why this attempt is no good, checked at the end and every few groups."""
        if len(self.sampler.tokens) % GROUP == 0 and (ended or self.sampler.groups % LOOP_CHECK_GROUPS == 0):
            if find_loop(self.sampler.tokens) is not None:
                return "loop"
            if ended and self.sampler.at_limit and not self.generation.settings.ends_full:
                return "no_end"
        return None

    def send(self, every_groups: int, *, rest: bool = False) -> None:
        """Hand out the groups that are complete, in pieces of `every_groups` (all that is left with `rest`)."""
        ready = self.sampler.groups - self.sent_groups
        if self.generation.streams and ready and (rest or ready >= every_groups):
            tokens = self.sampler.tokens[self.sent_groups * GROUP : self.sampler.groups * GROUP]
            self.generation.put(np.array(tokens, dtype=np.int32))
            self.sent_groups = self.sampler.groups

    def start_over(self) -> bool:
        """Begin the next attempt, unless pieces are out or attempts are used up."""
        attempt = self.sampler.attempt + 1
        if self.sent_groups or attempt >= self.generation.settings.attempts:
            return False
        self.sampler = Sampler(self.generation.settings, attempt)
        return True

    def outcome(self, collapse: Collapse | None) -> Outcome:
        return Outcome(np.array(self.sampler.tokens, dtype=np.int32), self.sampler.attempt + 1, collapse)


class Waiting:
    """Generations that wait, higher priority first, then by arrival; thread safe, bounded, open until closed."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._heap: list[tuple[int, int, Generation]] = []
        self._arrivals = itertools.count()
        self._changed = threading.Condition()
        self.is_open = True

    def __len__(self) -> int:
        with self._changed:
            return len(self._heap)

    def push(self, generation: Generation) -> None:
        """Raises InferenceUnavailable when closed, or when too many wait already."""
        with self._changed:
            if not self.is_open:
                raise InferenceUnavailable("The language model is closed.")
            if len(self._heap) >= self._limit:
                raise InferenceUnavailable(f"{len(self._heap)} generations wait already.", "Try again later.")
            heapq.heappush(self._heap, (-generation.priority, next(self._arrivals), generation))
            self._changed.notify()

    def pop(self, slots: int = 1) -> Generation | None:
        """The next one, or None while there is none or it needs more slots than these."""
        with self._changed:
            is_fit = bool(self._heap) and len(self._heap[0][2].prompts) <= slots
            return heapq.heappop(self._heap)[2] if is_fit else None

    def wait(self, timeout_s: float) -> None:
        """Return when something waits, when closed, or after the timeout."""
        with self._changed:
            if not self._heap and self.is_open:
                self._changed.wait(timeout_s)

    def drop_refused(self) -> None:
        """Let go of those that were cancelled or are late."""
        with self._changed:
            refused = [(entry, reason) for entry in self._heap if (reason := entry[2].refusal)]
            for entry, reason in refused:
                self._heap.remove(entry)
                entry[2].put(reason)
            if refused:
                heapq.heapify(self._heap)

    def close(self) -> None:
        with self._changed:
            self.is_open = False
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """Answer all that wait with an error."""
        with self._changed:
            for *_, generation in self._heap:
                generation.put(error)
            self._heap.clear()


class GenerationEngine(ABC):
    """What the served model needs of an engine, and what all engines do alike: generations wait in line, and one thread
    works on them until the engine is closed. Thread safe.

    A subclass is ready once it has called `_begin_work`; then `_loop` runs in the thread while `_waiting` is open.
    """

    _running: Sized

    def __init__(self, vocabulary: int, settings: EngineSettings | None) -> None:
        self.settings = settings or EngineSettings()
        self._vocabulary_size = vocabulary
        self._waiting = Waiting(self.settings.queue_limit)
        self._thread = threading.Thread(target=self._loop, name=type(self).__name__, daemon=True)

    def submit(self, generation: Generation) -> Generation:
        """Queue a sequence; returns it. The result's length is capped by what the context leaves.

        Raises UserError for a prompt that does not fit and for guidance that the engine cannot give,
        InferenceUnavailable when too many wait already.
        """
        if generation.against is not None and not self.guides:
            raise UserError("Guided draws need the built-in engine and two slots.",
                            "Leave guidance out, or change EDITX_LLM_ENGINE or EDITX_LLM_SLOTS.",
                            "invalid_sampling")  # fmt: skip
        generation.fit(self._vocabulary_size, self.settings.context)
        self._waiting.push(generation)
        return generation

    @property
    def guides(self) -> bool:
        """Whether sequences may be guided away from another prompt."""
        return False

    @property
    def load(self) -> tuple[int, int]:
        """How many sequences run and how many wait."""
        return len(self._running), len(self._waiting)

    @property
    @abstractmethod
    def prefix_hits(self) -> int:
        """Prompt tokens that came out of the prefix cache so far."""

    def close(self) -> None:
        """Stop. Everything unfinished fails with InferenceUnavailable. Safe to call twice."""
        self._waiting.close()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _begin_work(self) -> None:
        self._thread.start()

    @abstractmethod
    def _loop(self) -> None:
        """Work until the line is closed, then fail what is unfinished."""
