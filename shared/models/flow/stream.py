"""One stream through the flow: token pairs in chunks, mel out, all state in one object, so that streams do not meet.

The look-ahead, the caches and the attention window are those of the published decoder: attention reaches the reference
and the newest 96 frames (1.92 s) before the chunk. Two things differ. Frame n always starts from noise frame n, as it
does without streaming; the published decoder starts every chunk after the window is full from the same noise. And the
reference is read without a look at what follows, so that any number of streams may begin from one reading: its last
pairs, which look ahead into the stream, are made with the first chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.models.flow.cfm import Conditions, flow_noise
from shared.models.flow.dit import BlockCache
from shared.models.flow.encoder import EncoderCache
from shared.models.flow.flow import Flow

LEFT_CONTEXT_FRAMES = 96
READING_SEED = 0
"""Of the noise that a reference is read with, which is the same whatever a stream's own seed is."""


@dataclass(frozen=True, eq=False)
class FlowVoice:
    """A reference that a flow has read; see `read_voice`. Streams share it and leave it as it is."""

    flow: Flow
    speaker: Tensor  # (1, 80)
    tokens: Tensor  # (L, 2), the last pairs of the reference, that are still to be made; L at most the look-ahead
    mel: Tensor  # (2L, 80), theirs
    frames: int  # of the whole reference
    shift: Tensor  # (1, 1, 80), see `Flow.shift`; zeros for a reference within the look-ahead
    steps: int
    cfg_rate: float | None
    encoder: EncoderCache | None
    blocks: list[list[BlockCache]] | None

    @property
    def size_bytes(self) -> int:
        """What keeping it costs."""
        caches = [part for step in self.blocks or [] for block in step for part in block]
        if self.encoder is not None:
            caches += [part for layer in self.encoder.layers for part in layer]
        return sum(part.nbytes for part in caches)


@torch.inference_mode()
def read_voice(
    flow: Flow,
    tokens: Tensor,
    mel: Tensor,
    speaker: Tensor,
    *,
    steps: int = 10,
    cfg_rate: float | None = None,
    noise: Tensor | None = None,
) -> FlowVoice:
    """Run a reference through the flow once: tokens (P, 2), mel (2P, 80), speaker (192,).

    noise (frames, 80) replaces the fixed one. Raises ValueError when the mel has another length.
    """
    frames = len(tokens) * flow.frames_per_token
    if len(mel) != frames:
        raise ValueError(f"the mel has {len(mel)} frames; the tokens of the reference ask for {frames}")
    rest = max(0, len(tokens) - flow.lookahead)
    made = rest * flow.frames_per_token
    timbre = flow.speaker(speaker[None])
    voice = FlowVoice(
        flow, timbre, tokens[rest:], mel[made:], frames, timbre.new_zeros(1, 1, flow.config.output_size), steps,
        cfg_rate, encoder=None, blocks=None,
    )  # fmt: skip
    if not rest:
        return voice
    mu, encoder = _rough(flow, tokens, None, last=False)
    voice = replace(voice, shift=flow.shift(mu, mel[None, :made], torch.tensor([frames], device=mel.device)))
    noise = flow_noise(READING_SEED, made, flow.config.output_size) if noise is None else noise[:made]
    _, blocks = _make(voice, mu, mel[:made], noise, None)
    return replace(voice, encoder=encoder, blocks=blocks)


class FlowStream:
    """State of one stream. Use from one thread at a time; any number of streams may share a flow and a voice."""

    def __init__(
        self,
        voice: FlowVoice,
        *,
        seed: int = 0,
        noise: Tensor | None = None,
        left_context_frames: int = LEFT_CONTEXT_FRAMES,
    ) -> None:
        """noise (frames, 80), those of the reference first, replaces the noise that `seed` gives."""
        self._voice, self._left_context = voice, left_context_frames
        self._encoder, self._blocks = voice.encoder, voice.blocks
        self._generator, self._noise, self._frames = torch.Generator().manual_seed(seed), noise, 0
        self._tokens, self._mel = voice.tokens, voice.mel  # of the reference, and not made yet
        self._next_noise(voice.frames - len(voice.mel))

    @torch.inference_mode()
    def push(self, tokens: Tensor, *, last: bool = False) -> Tensor:
        """Token pairs (T + look-ahead, 2) to the mel of the first T, (2T, 80); when `last`, all pairs are made.

        The look-ahead pairs must be given again at the start of the next call.
        """
        tokens, given = torch.cat([self._tokens, tokens]), self._mel
        made = len(tokens) - (0 if last else self._voice.flow.lookahead)
        noise = self._next_noise(made * self._voice.flow.frames_per_token)
        mu, self._encoder = _rough(self._voice.flow, tokens, self._encoder, last=last)
        mel, blocks = _make(self._voice, mu, given, noise, self._blocks)
        self._blocks = [[self._shorten(cache) for cache in step] for step in blocks]
        self._tokens, self._mel = tokens[:0], given[:0]
        return mel[len(given) :]

    def _next_noise(self, frames: int) -> Tensor:
        start, self._frames = self._frames, self._frames + frames
        if self._noise is not None:
            return self._noise[start : self._frames]
        return torch.randn(frames, self._voice.flow.config.output_size, generator=self._generator)

    def _shorten(self, cache: BlockCache) -> BlockCache:
        """Keep the frames of the reference and the newest frames after it."""
        keys, values = cache.keys, cache.values
        surplus = keys.shape[2] - self._voice.frames - self._left_context
        if surplus <= 0:
            return cache
        keys, values = (
            torch.cat([part[:, :, : self._voice.frames], part[:, :, self._voice.frames + surplus :]], dim=2)
            for part in (keys, values)
        )
        return BlockCache(keys, values, cache.conv1, cache.conv2)


def _rough(
    flow: Flow, tokens: Tensor, encoder: EncoderCache | None, *, last: bool
) -> tuple[Tensor, EncoderCache | None]:
    """The rough mel of one chunk (1, frames, 80) and the encoder's cache after it."""
    hidden, encoder = flow.encoder.forward_chunk(flow.input_embedding(tokens[None]), encoder, last=last)
    return flow.encoder_proj(hidden), encoder


def _make(
    voice: FlowVoice, mu: Tensor, given: Tensor, noise: Tensor, blocks: list[list[BlockCache]] | None
) -> tuple[Tensor, list[list[BlockCache]]]:
    """The mel (frames, 80) of one chunk's rough mel and the caches after it. `given` (at most frames, 80): what of the
    mel is known."""
    cond = F.pad(given.to(mu), (0, 0, 0, mu.shape[1] - len(given)))[None]
    conditions = Conditions(mu + voice.shift, voice.speaker, cond)
    noise = noise.to(mu.device)[None]
    mel, blocks = voice.flow.decoder.forward_chunk(noise, conditions, voice.steps, voice.cfg_rate, blocks)
    return mel[0], blocks
