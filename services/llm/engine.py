"""Continuous batching: sequences join and leave the running batch between decode steps.

One thread owns the model. Each turn of its loop drops what was cancelled or is late, lets waiting requests into free
slots, runs one chunk of one prompt, then one decode step for everything that runs. A sequence's result depends on its
own prompt, settings and seed alone: prompts are prefilled alone in chunks at fixed places, decode rows have the same
bits in any batch (services.llm.decoding), and sampling is counter-based. Knows nothing about what prompts mean.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.llm.decoding import Decoder, ExactDecoder, StaticDecoder
from services.llm.prefix import PrefixCache
from services.llm.sampling import END, Sampler, SamplingSettings, find_loop
from shared.codes import AUDIO_VOCAB, GROUP, Codes
from shared.errors import UserError
from shared.inference.port import DeadlineExceeded, InferenceUnavailable, RequestCancelled
from shared.models.step1 import Step1
from shared.tallies import passed

Collapse = Literal["loop", "no_end"]
LOOP_CHECK_GROUPS = 8
IDLE_S = 0.5


@dataclass(frozen=True)
class EngineSettings:
    """Bounds of an engine. `context`: prompt and result of one sequence together, in tokens."""

    slots: int = 16
    context: int = 4096
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


class _Sequence:
    """A generation in a slot: first its prompt is read, then it draws tokens."""

    def __init__(self, generation: Generation, slot: int) -> None:
        self.generation = generation
        self.slot = slot
        self.sampler = Sampler(generation.settings)
        self.prompt_hidden: Tensor | None = None                # (hidden,), of the prompt's last token, once it is read
        self.sent_groups = 0

    @property
    def reads(self) -> bool:
        return self.prompt_hidden is None

    def collapse(self, ended: bool) -> Collapse | None:
        """Why this attempt is no good, checked at the end and every few groups."""
        if len(self.sampler.tokens) % GROUP == 0 and (ended or self.sampler.groups % LOOP_CHECK_GROUPS == 0):
            if find_loop(self.sampler.tokens) is not None:
                return "loop"
            if ended and self.sampler.at_limit:
                return "no_end"
        return None

    def send(self, every_groups: int, *, rest: bool = False) -> None:
        """Hand out the groups that are complete, in pieces of `every_groups` (all that is left with `rest`)."""
        ready = self.sampler.groups - self.sent_groups
        if self.generation.streams and ready and (rest or ready >= every_groups):
            tokens = self.sampler.tokens[self.sent_groups * GROUP : self.sampler.groups * GROUP]
            self.generation.put(np.array(tokens, dtype=np.int32))
            self.sent_groups = self.sampler.groups


class Engine:
    """Runs a model for many callers. Thread safe; close it to stop its thread.

    `audio_offset` is the id of mixed id 0, `eos` the id that ends a turn.
    """

    def __init__(self, model: Step1, *, audio_offset: int, eos: int, settings: EngineSettings | None = None) -> None:
        self.settings = settings or EngineSettings()
        self._model = model
        self._offset = audio_offset
        choices = torch.tensor([*range(audio_offset, audio_offset + AUDIO_VOCAB), eos], device=model.device)
        make = StaticDecoder if model.device.type == "cuda" else ExactDecoder
        with torch.inference_mode():
            self._decoder: Decoder = make(model, choices, slots=self.settings.slots, capacity=self.settings.context)
        self._prefixes = PrefixCache(self.settings.prefix_cache_tokens, model.chunk)
        self._waiting: list[tuple[int, int, Generation]] = []
        self._running: list[_Sequence] = []
        self._free = list(range(self.settings.slots))
        self._arrivals = itertools.count()
        self._wake = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._loop, name="llm-engine", daemon=True)
        self._thread.start()

    def submit(self, generation: Generation) -> Generation:
        """Queue a sequence; returns it. The result's length is capped by what the context leaves.

        Raises UserError for a prompt that does not fit, InferenceUnavailable when too many wait already.
        """
        prompt, settings = generation.prompt, generation.settings
        if prompt.ndim != 1 or not len(prompt) or prompt.min() < 0 or prompt.max() >= self._model.config.vocab_size:
            raise UserError("The prompt must be a list of ids of the checkpoint's vocabulary.",
                            "Encode it with the text tokenizer of the same checkpoint.", "invalid_prompt")  # fmt: skip
        room = (self.settings.context - len(prompt) - 1) // GROUP
        if room < settings.min_groups:
            raise UserError(
                f"The prompt of {len(prompt)} tokens leaves no room for {settings.min_groups * GROUP} more in a "
                f"context of {self.settings.context}.", "Use a shorter recording or raise the context.",
                "prompt_too_long",
            )  # fmt: skip
        generation.settings = replace(settings, max_groups=min(settings.max_groups, room))
        with self._wake:
            if not self._open:
                raise InferenceUnavailable("The language model is closed.")
            if len(self._waiting) >= self.settings.queue_limit:
                raise InferenceUnavailable(f"{len(self._waiting)} generations wait already.", "Try again later.")
            heapq.heappush(self._waiting, (-generation.priority, next(self._arrivals), generation))
            self._wake.notify()
        return generation

    @property
    def load(self) -> tuple[int, int]:
        """How many sequences run and how many wait."""
        with self._wake:
            return len(self._running), len(self._waiting)

    @property
    def prefix_hits(self) -> int:
        """Prompt tokens that came out of the prefix cache so far."""
        return self._prefixes.hits

    def close(self) -> None:
        """Stop. Everything unfinished fails with InferenceUnavailable. Safe to call twice."""
        with self._wake:
            self._open = False
            self._wake.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    @torch.inference_mode()
    def _loop(self) -> None:
        while self._open:
            try:
                self._drop_refused()
                self._admit()
                reading = next((s for s in self._running if s.reads), None)
                if reading is not None:
                    self._read(reading)
                writing = [s for s in self._running if not s.reads]
                if writing:
                    self._write(writing)
            except Exception as error:
                self._fail_all(error)
        self._fail_all(InferenceUnavailable("The language model was closed."), waiting=True)

    def _drop_refused(self) -> None:
        for sequence in list(self._running):
            if refusal := sequence.generation.refusal:
                self._leave(sequence, refusal)
        with self._wake:
            refused = [(entry, reason) for entry in self._waiting if (reason := entry[2].refusal)]
            for entry, reason in refused:
                self._waiting.remove(entry)
                entry[2].put(reason)
            if refused:
                heapq.heapify(self._waiting)

    def _admit(self) -> None:
        with self._wake:
            if not self._running and not self._waiting and self._open:
                self._wake.wait(timeout=IDLE_S)
            while self._waiting and self._free:
                generation = heapq.heappop(self._waiting)[2]
                slot = self._free.pop()
                self._decoder.cache.lengths[slot] = 0
                self._running.append(_Sequence(generation, slot))

    def _read(self, sequence: _Sequence) -> None:
        """One chunk of a prompt; after the last one the first token is drawn."""
        prompt, cache, slot = sequence.generation.prompt, self._decoder.cache, sequence.slot
        hidden = None
        if cache.lengths[slot] == 0:
            hidden = self._prefixes.restore(prompt, cache, slot)
        if hidden is None:
            done = cache.lengths[slot]
            stop = min((done // self._model.chunk + 1) * self._model.chunk, len(prompt))
            hidden = self._model.prefill(torch.from_numpy(prompt[done:stop]), cache, slot)
            if stop < len(prompt):
                return
            self._prefixes.store(prompt, cache, slot, hidden)
        sequence.prompt_hidden = hidden
        self._draw([sequence], hidden[None])

    def _write(self, sequences: list[_Sequence]) -> None:
        """One decode step for the sequences that draw tokens."""
        passed("llm", len(sequences))
        newest = [self._offset + s.sampler.tokens[-1] for s in sequences]
        self._draw(sequences, self._decoder.step(newest, [s.slot for s in sequences]))

    def _draw(self, sequences: list[_Sequence], hidden: Tensor) -> None:
        logits = self._decoder.logits(hidden).cpu().numpy()
        for sequence, row in zip(sequences, logits, strict=True):
            try:
                ended = sequence.sampler.choose(row) == END
                self._settle(sequence, ended)
            except Exception as error:
                self._leave(sequence, error)

    def _settle(self, sequence: _Sequence, ended: bool) -> None:
        """After a draw: finish, start over, or hand out what is there."""
        collapse = sequence.collapse(ended)
        if collapse and self._start_over(sequence):
            return
        if ended or collapse:
            sequence.send(1, rest=True)
            mixed = np.array(sequence.sampler.tokens, dtype=np.int32)
            self._leave(sequence, Outcome(mixed, sequence.sampler.attempt + 1, collapse))
        else:
            sequence.send(self.settings.stream_groups)

    def _start_over(self, sequence: _Sequence) -> bool:
        """A new attempt on the prompt that is still in the slot. Not when pieces are out or attempts are used up."""
        attempt = sequence.sampler.attempt + 1
        if sequence.sent_groups or attempt >= sequence.generation.settings.attempts:
            return False
        assert sequence.prompt_hidden is not None
        sequence.sampler = Sampler(sequence.generation.settings, attempt)
        self._decoder.cache.lengths[sequence.slot] = len(sequence.generation.prompt)
        self._draw([sequence], sequence.prompt_hidden[None])
        return True

    def _leave(self, sequence: _Sequence, last: Outcome | Exception) -> None:
        self._running.remove(sequence)
        self._free.append(sequence.slot)
        sequence.generation.put(last)

    def _fail_all(self, error: Exception, *, waiting: bool = False) -> None:
        for sequence in list(self._running):
            self._leave(sequence, error)
        if waiting:
            with self._wake:
                for *_, generation in self._waiting:
                    generation.put(error)
                self._waiting.clear()
