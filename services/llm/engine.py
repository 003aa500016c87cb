"""Continuous batching: sequences join and leave the running batch between decode steps.

One thread owns the model. Each turn of its loop drops what was cancelled or is late, lets waiting requests into free
slots, runs one chunk of one prompt, then one decode step for everything that runs. A sequence's result depends on its
own prompt, settings and seed alone: prompts are prefilled alone in chunks at fixed places, decode rows have the same
bits in any batch (services.llm.decoding), and sampling is counter-based. Knows nothing about what prompts mean.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from services.llm.decoding import Decoder, ExactDecoder, StaticDecoder
from services.llm.prefix import PrefixCache
from services.llm.requests import IDLE_S, Draft, EngineSettings, Generation, GenerationEngine, Outcome
from services.llm.sampling import END
from services.llm.threads import is_small, threads
from shared.codes import AUDIO_VOCAB
from shared.inference.port import InferenceUnavailable
from shared.models.step1 import Step1
from shared.tallies import passed

BEGIN_S = 10.0
"""The longest wait for the engine's thread to begin."""


class _Sequence(Draft):
    """A generation in as many slots as it has prompts: first these are read, then it draws tokens."""

    def __init__(self, generation: Generation, slots: list[int]) -> None:
        super().__init__(generation)
        self.slots = slots
        self.prompt_hidden: list[Tensor] = []  # (hidden,) each, of the last token of the prompts that are read

    @property
    def reads(self) -> bool:
        return len(self.prompt_hidden) < len(self.slots)


class Engine(GenerationEngine):
    """Runs a model for many callers; close it to stop its thread.

    `audio_offset` is the id of mixed id 0, `eos` the id that ends a turn.
    """

    def __init__(self, model: Step1, *, audio_offset: int, eos: int, settings: EngineSettings | None = None) -> None:
        super().__init__(model.config.vocab_size, settings)
        self._model = model
        self._offset = audio_offset
        choices = torch.tensor([*range(audio_offset, audio_offset + AUDIO_VOCAB), eos], device=model.device)
        make = StaticDecoder if model.device.type == "cuda" else ExactDecoder
        self._prefixes = PrefixCache(self.settings.prefix_cache_tokens, model.chunk)
        self._running: list[_Sequence] = []
        self._free = list(reversed(range(self.settings.slots)))  # the lowest is last, and taken first
        self._begins = threading.Event()
        with threads(1 if is_small(model) else torch.get_num_threads()):
            with torch.inference_mode():
                self._decoder: Decoder = make(model, choices, slots=self.settings.slots, capacity=self.settings.context)
            self._begin_work()
            self._begins.wait(BEGIN_S)

    @property
    def guides(self) -> bool:
        return self.settings.slots > 1

    @property
    def prefix_hits(self) -> int:
        return self._prefixes.hits

    @torch.inference_mode()
    def _loop(self) -> None:
        torch.get_num_threads()  # the thread takes over torch's number here, and keeps it
        self._begins.set()
        while self._waiting.is_open:
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
        self._waiting.drop_refused()

    def _admit(self) -> None:
        if not self._running:
            self._waiting.wait(IDLE_S)
        while self._free and (generation := self._waiting.pop(len(self._free))):
            slots = [self._free.pop() for _ in generation.prompts]
            for slot in slots:
                self._decoder.cache.lengths[slot] = 0
            self._running.append(_Sequence(generation, slots))

    def _read(self, sequence: _Sequence) -> None:
        """One chunk of a prompt; after the last one of the last prompt the first token is drawn."""
        number = len(sequence.prompt_hidden)
        prompt, slot, cache = sequence.generation.prompts[number], sequence.slots[number], self._decoder.cache
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
        sequence.prompt_hidden.append(hidden)
        if not sequence.reads:
            self._draw([sequence], torch.stack(sequence.prompt_hidden))

    def _write(self, sequences: list[_Sequence]) -> None:
        """One decode step for the sequences that draw tokens."""
        passed("llm", len(sequences))
        newest = [self._offset + s.sampler.tokens[-1] for s in sequences for _ in s.slots]
        self._draw(sequences, self._decoder.step(newest, [slot for s in sequences for slot in s.slots]))

    def _draw(self, sequences: list[_Sequence], hidden: Tensor) -> None:
        """A token for each sequence, from the hidden states of all their slots in turn."""
        rows = iter(self._decoder.logits(hidden).cpu().numpy())
        for sequence in sequences:
            logits = [next(rows) for _ in sequence.slots]
            try:
                ended = sequence.sampler.choose(*logits) == END
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
            self._leave(sequence, sequence.outcome(collapse))
        else:
            sequence.send(self.settings.stream_groups)

    def _start_over(self, sequence: _Sequence) -> bool:
        """A new attempt on the prompt that is still in the slot. Not when pieces are out or attempts are used up."""
        if not sequence.start_over():
            return False
        for slot, prompt in zip(sequence.slots, sequence.generation.prompts, strict=True):
            self._decoder.cache.lengths[slot] = len(prompt)
        self._draw([sequence], torch.stack(sequence.prompt_hidden))
        return True

    def _leave(self, sequence: _Sequence, last: Outcome | Exception) -> None:
        self._running.remove(sequence)
        self._free = sorted([*self._free, *sequence.slots], reverse=True)
        sequence.generation.put(last)

    def _fail_all(self, error: Exception, *, waiting: bool = False) -> None:
        for sequence in list(self._running):
            self._leave(sequence, error)
        if waiting:
            self._waiting.fail(error)
