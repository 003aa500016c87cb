"""One stream through the flow: token pairs in chunks, mel out, all state in one object, so that streams do not meet.

The look-ahead, the caches and the attention window are those of the published decoder: attention reaches the reference
and the newest 96 frames (1.92 s) before the chunk. One thing differs: frame n always starts from noise frame n, as it
does without streaming; the published decoder starts every chunk after the window is full from the same noise.
"""

import torch
from torch import Tensor

from shared.models.flow.cfm import Conditions
from shared.models.flow.dit import BlockCache
from shared.models.flow.encoder import EncoderCache
from shared.models.flow.flow import Flow

LEFT_CONTEXT_FRAMES = 96


class FlowStream:
    """State of one stream. Use from one thread at a time; any number of streams may share a Flow."""

    def __init__(
        self,
        flow: Flow,
        prompt_tokens: Tensor,
        prompt_mel: Tensor,
        speaker: Tensor,
        *,
        seed: int = 0,
        noise: Tensor | None = None,
        steps: int = 10,
        cfg_rate: float | None = None,
        left_context_frames: int = LEFT_CONTEXT_FRAMES,
    ) -> None:
        """Runs the reference through the model once.

        prompt_tokens (P + look-ahead, 2): those of the reference, then the first `flow.lookahead` pairs of the stream;
        prompt_mel (2P, 80); speaker (192,); noise (frames, 80) replaces the noise that `seed` gives.
        Raises ValueError when prompt_mel has another length.
        """
        frames = (len(prompt_tokens) - flow.lookahead) * flow.frames_per_token
        if len(prompt_mel) != frames:
            raise ValueError(f"prompt_mel has {len(prompt_mel)} frames; the tokens of the reference ask for {frames}")
        self._flow, self._steps, self._cfg_rate = flow, steps, cfg_rate
        self._generator = torch.Generator().manual_seed(seed)
        self._noise = noise
        self._frames = 0
        self._prompt_frames, self._left_context = frames, left_context_frames
        self._encoder: EncoderCache | None = None
        self._blocks: list[list[BlockCache]] | None = None
        with torch.inference_mode():
            self._speaker = flow.speaker(speaker[None])
            if frames:
                self._run(prompt_tokens, prompt_mel, last=False)

    @torch.inference_mode()
    def push(self, tokens: Tensor, *, last: bool = False) -> Tensor:
        """Token pairs (T + look-ahead, 2) to the mel of the first T, (2T, 80); when `last`, all pairs are made.

        The look-ahead pairs must be given again at the start of the next call.
        """
        return self._run(tokens, None, last=last)

    def _run(self, tokens: Tensor, prompt_mel: Tensor | None, *, last: bool) -> Tensor:
        flow = self._flow
        embedded = flow.input_embedding(tokens[None])
        hidden, self._encoder = flow.encoder.forward_chunk(embedded, self._encoder, last=last)
        mu = flow.encoder_proj(hidden)
        cond = torch.zeros_like(mu) if prompt_mel is None else prompt_mel[None].to(mu)
        noise = self._next_noise(mu.shape[1]).to(mu.device)
        mel, blocks = flow.decoder.forward_chunk(
            noise[None], Conditions(mu, self._speaker, cond), self._steps, self._cfg_rate, self._blocks
        )
        self._blocks = [[self._shorten(cache) for cache in step] for step in blocks]
        return mel[0]

    def _next_noise(self, frames: int) -> Tensor:
        start, self._frames = self._frames, self._frames + frames
        if self._noise is not None:
            return self._noise[start : self._frames]
        return torch.randn(frames, self._flow.config.output_size, generator=self._generator)

    def _shorten(self, cache: BlockCache) -> BlockCache:
        """Keep the frames of the reference and the newest frames after it."""
        keys, values = cache.keys, cache.values
        surplus = keys.shape[2] - self._prompt_frames - self._left_context
        if surplus <= 0:
            return cache
        keys, values = (
            torch.cat([part[:, :, : self._prompt_frames], part[:, :, self._prompt_frames + surplus :]], dim=2)
            for part in (keys, values)
        )
        return BlockCache(keys, values, cache.conv1, cache.conv2)
