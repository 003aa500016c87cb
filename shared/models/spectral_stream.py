"""One stream through the spectral vocoder: mel in chunks, waveform out, with no seam to fade over.

Every short-time spectrum is made once, when the frames it looks ahead to are known, and overlap-added to those before.
The phase of the excitation runs on in float64 and its noise is drawn on, so chunks meet as frames do in one pass. With
a look-ahead of `exact_lookahead` frames the stream is one pass; with less, the network sees the newest frame held in
the place of what follows, and that is the only difference. Knows nothing about flows, files or services.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.models.spectral import (
    RIGHT_CONTEXT,
    SILENCE,
    SpectralConfig,
    SpectralVocoder,
    fill_gaps,
    harmonics,
    interpolate,
    shaped,
)

LOOKAHEAD_FRAMES = 10
"""With nano on speech: 62 dB below the signal is what a stream lacks to one pass (8 frames: 38 dB, 6: 26 dB)."""
HELD_FRAMES = 20
"""How often the newest frame stands for those that follow."""
WINDOW_FRAMES = 2
"""Settled frames that are not sound yet: windows of the overlap-add end there."""


def exact_lookahead(config: SpectralConfig) -> int:
    """Frames of look-ahead at which nothing that is still unknown reaches the sound."""
    return config.f0_reach + config.filter_reach


@dataclass(frozen=True)
class SpectralState:
    """What a chunk leaves to the next. A frame is settled once its F0 does not change any more.

    `mel` (B, 80, t): the past that convolutions see, then the frames that are not settled. `f0` (B, s): of the settled
    frames among them. `held` (B,): the last voiced F0, 0 before there was one. `newest` (B, 2, 1): F0 without gaps, and
    voicing, of the newest settled frame. `cycles` (B,): float64, the phase reached. `pulses`, `noise` (B, n): the ends
    of both excitations, where the next window begins. `sound` (B, n), `weight` (n,): the overlap-add's tail.
    """

    mel: Tensor
    f0: Tensor
    held: Tensor
    newest: Tensor
    cycles: Tensor
    pulses: Tensor
    noise: Tensor
    sound: Tensor
    weight: Tensor
    settled: int = 0  # frames of the whole stream
    spectra: int = 0  # that were overlap-added

    @classmethod
    def beginning(cls, mel: Tensor) -> SpectralState:
        """The state before a first chunk like `mel` (B, 80, T)."""
        batch = len(mel)
        none, zero = mel.new_zeros(batch, 0), mel.new_zeros(batch)
        return cls(mel[..., :0], none, zero, mel.new_zeros(batch, 2, 0), zero.double(), none, none, none, none[0])


class SpectralStream:
    """State of one stream. Use from one thread at a time; any number of streams may share a vocoder."""

    def __init__(self, vocoder: SpectralVocoder, *, seed: int = 0, lookahead_frames: int = LOOKAHEAD_FRAMES) -> None:
        self._vocoder, self._lookahead = vocoder, lookahead_frames
        self._generator = torch.Generator().manual_seed(seed)
        self._state: SpectralState | None = None
        self._missing = 0  # samples that the frames so far ask for

    @torch.inference_mode()
    def push(self, mel: Tensor, *, last: bool = False) -> Tensor:
        """mel (80, T) to the samples that are now certain, (n,) float32 within +-0.99; all that is left when `last`.

        What is certain ends `lookahead_frames` + 2 frames before the newest frame.
        """
        self._missing += mel.shape[1] * self._vocoder.config.hop_size
        if not self._missing:
            return mel.new_zeros(0, dtype=torch.float32)
        mel, lookahead = mel.float()[None], self._lookahead
        if last:
            mel, lookahead = F.pad(mel, (0, RIGHT_CONTEXT), value=SILENCE), RIGHT_CONTEXT - 2 * WINDOW_FRAMES
        wave, self._state = forward_chunk(self._vocoder, mel, self._state, lookahead, self._generator)
        wave = wave[0, : self._missing]
        self._missing -= len(wave)
        return wave


def forward_chunk(
    vocoder: SpectralVocoder, mel: Tensor, state: SpectralState | None, lookahead: int, generator: torch.Generator
) -> tuple[Tensor, SpectralState]:
    """New mel (B, 80, T) to the samples (B, n) that have `lookahead` + 2 frames after them, and the next state.

    `generator` draws the noise, on the CPU; every call must get the same one.
    """
    c, state = vocoder.config, state or SpectralState.beginning(mel)
    mel = torch.cat([state.mel, mel], dim=2)
    past = state.f0.shape[1]
    settled = state.settled + mel.shape[2] - past - lookahead
    begin, end = state.spectra, max(0, ((2 * settled - 1) * c.hop_size - c.n_fft) // (2 * c.hop) + 1)
    if settled < WINDOW_FRAMES or end <= begin:
        return mel.new_zeros(len(mel), 0), replace(state, mel=mel)
    seen = F.pad(mel, (0, HELD_FRAMES), mode="replicate")
    f0 = torch.cat([state.f0, vocoder.f0_predictor.decode(seen)[:, past:]], dim=1)
    state, new_pulses = _excite(state, f0[:, past:], settled, c)
    noise = torch.randn(new_pulses.shape[1], generator=generator).to(mel.device).expand(len(mel), -1)
    pulses, noise = _after(state.pulses, new_pulses, c), _after(state.noise, noise, c)
    start = (state.settled - past) * c.upsample  # the first spectrum of `mel`
    filters = (part[..., begin - start : end - start] for part in vocoder.filters(seen, f0))
    spectrum = shaped(vocoder.spectra(pulses, centred=False), vocoder.spectra(noise, centred=False), *filters)
    sound, weight = _overlap_add(spectrum, state, vocoder)
    ready = (end - begin) * c.hop
    wave = (sound[:, :ready] / weight[:ready].clamp(min=1e-8)).clamp(-0.99, 0.99)
    if not begin:
        wave = wave[:, c.n_fft // 2 :]  # windows reach back before the first sample
    spare = max(0, past + settled - state.settled - c.filter_reach - WINDOW_FRAMES)
    return wave, replace(
        state,
        mel=mel[..., spare:],
        f0=f0[:, spare : past + settled - state.settled],
        pulses=pulses[:, ready:],
        noise=noise[:, ready:],
        sound=sound[:, ready:],
        weight=weight[ready:],
        settled=settled,
        spectra=end,
    )


def _excite(state: SpectralState, f0: Tensor, settled: int, config: SpectralConfig) -> tuple[SpectralState, Tensor]:
    """Pulses up to the centre of the newest frame that is settled now. f0 (B, T): of the frames not settled before."""
    new = settled - state.settled
    track = torch.stack([fill_gaps(f0, state.held), (f0 > 0).float()], dim=1)[..., :new]  # (B, 2, new)
    half = config.hop_size // 2  # interpolation is certain between centres
    both = interpolate(torch.cat([state.newest, track], dim=2).flatten(0, 1), config.hop_size)
    both = both[:, half if state.settled else 0 : -half].unflatten(0, (-1, 2))
    at_samples, gate = both[:, 0].double(), both[:, 1]
    cycles = state.cycles[:, None] + torch.cumsum(at_samples / config.sampling_rate, dim=1)
    pulses = harmonics(at_samples, cycles, config.sampling_rate) * gate
    voiced = track[:, 1, :].bool().any(1)
    held = torch.where(voiced, track[:, 0, -1], state.held)
    end = cycles[:, -1]
    return replace(state, held=held, newest=track[..., -1:], cycles=end - end.floor()), pulses


def _after(old: Tensor, new: Tensor, config: SpectralConfig) -> Tensor:
    """New samples (B, n) after the end of the old; at the very start after their own mirror image, as one pass has."""
    if not old.shape[1]:
        old = new[:, 1 : config.n_fft // 2 + 1].flip(1)
    return torch.cat([old, new], dim=1)


def _overlap_add(spectrum: Tensor, state: SpectralState, vocoder: SpectralVocoder) -> tuple[Tensor, Tensor]:
    """Spectra (B, bins, t) as windowed sound added to the tail of what was before, and the windows' squares."""
    c, count = vocoder.config, spectrum.shape[-1]
    size = (count - 1) * c.hop + c.n_fft
    frames = torch.fft.irfft(spectrum, c.n_fft, dim=1) * vocoder.window[:, None]
    squares = vocoder.window.square()[None, :, None].expand(1, -1, count)
    added = F.fold(torch.cat([frames, squares]), (1, size), (1, c.n_fft), stride=(1, c.hop))[:, 0, 0]
    sound, weight = added[:-1], added[-1]
    return sound + F.pad(state.sound, (0, size - state.sound.shape[1])), weight + F.pad(
        state.weight, (0, size - len(state.weight))
    )
