"""One stream through any vocoder: mel in chunks, waveform out.

Of HiFT and BigVGAN the last frames of every chunk are made again with the next, and the two versions are faded into
each other; HiFT's source signal runs on without a break. The spectral vocoder needs no fading (`spectral_stream`).
Knows nothing about flows, files or services.
"""

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from shared.models.hift import HiFT, SourceState
from shared.models.spectral import SpectralRows
from shared.models.spectral_stream import SpectralStream


class Vocoder(Protocol):
    """Mel to waveform."""

    @property
    def hop(self) -> int:
        """Samples per mel frame."""

    def __call__(self, mel: Tensor, lengths: Tensor | None = None, seeds: Sequence[int] | None = None) -> Tensor:
        """mel (B, 80, T), lengths (B,) in frames, one seed per member -> waveform (B, T*hop)."""


class FadedVocoder(Vocoder, Protocol):
    """A vocoder that is streamed by fading."""

    @property
    def context_frames(self) -> int:
        """Past frames that a stream hands over with every chunk, so that its start does not sound like one."""


class MelStream(Protocol):
    """One stream. Use from one thread at a time."""

    def push(self, mel: Tensor, *, last: bool = False) -> Tensor:
        """mel (80, T) to the samples that are now certain, (n,) float32; all that is left when `last`."""


def open_stream(vocoder: Vocoder, seed: int) -> MelStream:
    """A stream through a vocoder, in the way that its kind needs."""
    if isinstance(vocoder, SpectralRows):
        return SpectralStream(vocoder.model, seed=seed)
    return VocoderStream(cast(FadedVocoder, vocoder), seed=seed)


def crossfade(before: Tensor, after: Tensor) -> Tensor:
    """Fade from the end of one waveform into the start of the next: `before` (n,), `after` (m >= n,) -> (m,).

    The fade is a Hamming window. As published its two halves sum to 1.08 and swell every seam; here they sum to 1.
    """
    size = len(before)
    window = torch.hamming_window(2 * size, periodic=False, device=after.device)
    rise = window[:size] / (window[:size] + window[size:])
    return torch.cat([after[:size] * rise + before * (1 - rise), after[size:]])


class VocoderStream:
    """State of one stream. Use from one thread at a time; any number of streams may share a vocoder.

    Every chunk is made together with the last frames of the one before: the vocoder's `context_frames`, whose audio is
    out already and only spares the new audio an edge, and `hold_frames`, whose audio was held back because it lacked
    what follows. Of the latter, the first `fade_frames` are faded from the first version into the second; there both
    have neighbours.
    """

    def __init__(self, vocoder: FadedVocoder, *, seed: int = 0, hold_frames: int = 8, fade_frames: int = 3) -> None:
        self._vocoder, self._seed = vocoder, seed
        self._context, self._hold, self._fade = vocoder.context_frames, hold_frames, fade_frames
        self._generator = torch.Generator().manual_seed(seed)
        self._mel: Tensor | None = None  # context and held frames, (80, T)
        self._held: Tensor | None = None  # the first version of the held frames, (n,)
        self._source: SourceState | None = None

    @torch.inference_mode()
    def push(self, mel: Tensor, *, last: bool = False) -> Tensor:
        """mel (80, T) to the samples that are now certain, (n,) float32; all that is left when `last`."""
        hop, held = self._vocoder.hop, self._held
        mel = mel if self._mel is None else torch.cat([self._mel, mel], dim=1)
        frames = mel.shape[1]
        if not frames:
            return mel.new_zeros(0, dtype=torch.float32)
        repeated = min(self._context + self._hold, frames)
        wave = self._vocode(mel, repeated)
        if self._mel is not None and held is not None:
            wave = wave[self._mel.shape[1] * hop - len(held) :]
            wave = crossfade(held[: self._fade * hop], wave)
        if last:
            return wave
        certain = max(0, len(wave) - self._hold * hop)
        self._mel, self._held = mel[:, frames - repeated :], wave[certain:]
        return wave[:certain]

    def _vocode(self, mel: Tensor, repeated: int) -> Tensor:
        if isinstance(self._vocoder, HiFT):
            wave, self._source = self._vocoder.forward_chunk(mel[None], self._source, repeated, self._generator)
            return wave[0]
        return self._vocoder(mel[None], None, [self._seed])[0]
