"""Streams through the decoder: audio tokens in as they are drawn, audio out as soon as it is certain.

A session owns all its state, so any number of them may run side by side. The table of sessions takes chunks in order,
answers a repeated chunk as it did before, and closes sessions that nobody feeds. Knows nothing about requests.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.codes import GROUP, LINGUISTIC_SIZE, SEMANTIC_PER_GROUP, Codes, split, time_align
from shared.errors import TransientError, UserError
from shared.models.flow import Flow, FlowStream, FlowVoice, read_voice
from shared.models.vocoder_stream import Vocoder, open_stream
from shared.tallies import looked_up

Audio = npt.NDArray[np.float32]
FILLER = (0, LINGUISTIC_SIZE, LINGUISTIC_SIZE, LINGUISTIC_SIZE)  # completes a group that was cut short, as published


def token_pairs(mixed: Codes) -> Tensor:
    """Mixed ids to (T, 2) pairs at 25 Hz; a last group that was cut short is filled as the published decoder does.

    Raises UserError naming the position of an id that is out of range or in the wrong place of its group.
    """
    lacking = -len(mixed) % GROUP
    filled = np.concatenate([mixed, FILLER[len(FILLER) - lacking :]]).astype(np.int32)
    split(filled)
    return time_align(torch.from_numpy(filled).long())


def stretch_prompt_mel(mel: Tensor, tokens: int, frames_per_token: int) -> Tensor:
    """The mel of a reference (frames, 80) at exactly `frames_per_token` frames per token, by repeating or leaving out.

    The published decoder does this since its tokens come from trimmed audio and its mel does not.
    """
    if not tokens:
        return mel[:0]
    return F.interpolate(mel.T[None], size=tokens * frames_per_token, mode="nearest")[0].T


def stretched(mel: Tensor, factor: float) -> Tensor:
    """A mel (frames, 80) said as much slower by `factor`, its pitch kept: (frames * factor, 80), at least one frame."""
    if factor == 1.0:
        return mel
    frames = max(1, round(len(mel) * factor))
    return F.interpolate(mel.T[None], size=frames, mode="linear", align_corners=False)[0].T


def loudest_part(pairs: Tensor, mel: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The `longest` pairs of a reference (P, 2), and their frames of its mel, that are loudest on average: most of them
    are speech. Begins with a group; a shorter reference stays whole."""
    if len(pairs) <= longest:
        return pairs, mel
    frames = len(mel) // len(pairs)
    levels = mel.mean(1).unflatten(0, (-1, frames)).mean(1).unfold(0, longest, SEMANTIC_PER_GROUP).mean(1)
    start = int(levels.argmax()) * SEMANTIC_PER_GROUP
    return pairs[start : start + longest], mel[start * frames : (start + longest) * frames]


@dataclass(frozen=True)
class Voice:
    """What a stream speaks with: pairs of the reference (P, 2), its mel (2P, 80), the speaker embedding (192,)."""

    pairs: Tensor
    mel: Tensor
    speaker: Tensor


class Session:
    """One stream. Feed it from one thread at a time."""

    def __init__(
        self,
        read: Callable[[], FlowVoice],
        vocoder: Vocoder,
        *,
        chunk_tokens: Sequence[int],
        seed: int = 0,
    ) -> None:
        """`read` gives the reference as the flow has read it; it is called with the first tokens."""
        self._read, self._seed = read, seed
        self._chunks = list(chunk_tokens)
        self._vocoder = open_stream(vocoder, seed)
        self._stream: FlowStream | None = None
        self._lookahead = 0
        self._mixed: Codes = np.zeros(0, np.int32)  # of a group that is not whole yet
        self._pairs = torch.zeros(0, 2, dtype=torch.long)  # waiting, the look-ahead included

    def feed(self, mixed: Codes, *, last: bool = False) -> Iterator[Audio]:
        """More audio tokens; yields the audio (n,) of every chunk that they complete, and the rest when `last`.

        Raises UserError when a stream ends without having had a token.
        """
        self._take(mixed, last=last)
        if self._stream is None and len(self._pairs):
            voice = self._read()
            self._stream, self._lookahead = FlowStream(voice, seed=self._seed), voice.flow.lookahead
            self._pairs = self._pairs.to(voice.tokens)
        lookahead = self._lookahead
        while self._stream is not None and len(self._pairs) >= self._chunks[0] + lookahead + int(last):
            size = self._chunks[0]
            if len(self._chunks) > 1:
                self._chunks.pop(0)
            audio = self._run(self._stream, self._pairs[: size + lookahead], last=False)
            self._pairs = self._pairs[size:]
            if len(audio):
                yield audio
        if not last:
            return
        if self._stream is None:
            raise UserError("The stream ended before its first audio token.", "Send at least one group of five.")
        yield self._run(self._stream, self._pairs, last=True)

    def _take(self, mixed: Codes, *, last: bool) -> None:
        mixed = np.concatenate([self._mixed, mixed])
        whole = len(mixed) if last else len(mixed) - len(mixed) % GROUP
        self._mixed = mixed[whole:]
        if whole:
            self._pairs = torch.cat([self._pairs, token_pairs(mixed[:whole]).to(self._pairs)])

    def _run(self, stream: FlowStream, pairs: Tensor, *, last: bool) -> Audio:
        mel = stream.push(pairs, last=last)
        audio: Audio = self._vocoder.push(mel.T, last=last).float().cpu().numpy()
        return audio


class Voices:
    """References that a flow has read, the most recently used ones within a size. Any thread may call it."""

    def __init__(self, flow: Flow, limit_bytes: int) -> None:
        self._flow, self._limit = flow, limit_bytes
        self._known: OrderedDict[bytes, FlowVoice] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, voice: Voice, *, steps: int, cfg_rate: float) -> FlowVoice:
        """The reference as the flow has read it for this many steps and this guidance."""
        key = _digest(voice, f"{steps} {cfg_rate}")
        with self._lock:
            known = self._known.get(key)
            looked_up("voices", hits=known is not None, misses=known is None)
            if known is not None:
                self._known.move_to_end(key)
                return known
        made = read_voice(self._flow, voice.pairs, voice.mel, voice.speaker, steps=steps, cfg_rate=cfg_rate)
        with self._lock:
            self._known[key] = made
            while self._known and self.size_bytes > self._limit:
                self._known.popitem(last=False)
        return made

    @property
    def size_bytes(self) -> int:
        """What is kept."""
        return sum(voice.size_bytes for voice in self._known.values())


def _digest(voice: Voice, dials: str) -> bytes:
    digest = hashlib.sha256(dials.encode())
    for part in (voice.pairs, voice.mel, voice.speaker):
        digest.update(f"{tuple(part.shape)}".encode())
        digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.digest()


@dataclass(eq=False)
class _Entry:
    session: Session | None  # None once the stream has ended
    next_index: int = 0
    answer: list[Audio] = field(default_factory=list)  # to the chunk before next_index
    touched: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Sessions:
    """Streams by name. Any thread may call it."""

    def __init__(self, *, limit: int, idle_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._idle_s, self._clock = limit, idle_s, clock
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Streams that are open."""
        return sum(entry.session is not None for entry in self._entries.values())

    def feed(
        self, name: str, index: int, mixed: Codes, *, last: bool, open_session: Callable[[], Session]
    ) -> Iterator[Audio]:
        """Chunk `index` (from 0) of a stream; the first opens it, the last ends it.

        A repeated chunk gets its old answer. A stream that fails or is left in the middle of a chunk is closed. Raises
        UserError for a chunk out of turn, TransientError when too many streams are open.
        """
        entry = self._entry(name, index, open_session)
        with entry.lock:
            if index == entry.next_index - 1:
                yield from entry.answer
                return
            if index != entry.next_index or entry.session is None:
                due = "no more" if entry.session is None else f"chunk {entry.next_index}"
                raise UserError(f"Stream {name} got chunk {index}; {due} was due.", "Send chunks in order, from 0.")
            answer, complete = [], False
            try:
                for audio in entry.session.feed(mixed, last=last):
                    answer.append(audio)
                    yield audio
                complete = True
            finally:
                if not complete:
                    self.close(name)
            entry.answer, entry.next_index, entry.touched = answer, index + 1, self._clock()
            if last:
                entry.session = None

    def close(self, name: str) -> None:
        """Forget a stream; one that is not known is no error."""
        with self._lock:
            self._entries.pop(name, None)

    def _entry(self, name: str, index: int, open_session: Callable[[], Session]) -> _Entry:
        with self._lock:
            now = self._clock()
            for idle in [key for key, entry in self._entries.items() if now - entry.touched > self._idle_s]:
                del self._entries[idle]
            if name not in self._entries:
                if index:
                    raise UserError(f"Stream {name} is not open.", "It may have been idle too long: begin at chunk 0.")
                if len(self) >= self._limit:
                    raise TransientError(f"{self._limit} streams are open, which is the limit.", "Try again shortly.")
                self._entries[name] = _Entry(open_session())
            entry = self._entries[name]
            entry.touched = now
            return entry
