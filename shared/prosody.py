"""The prosody of audio tokens, without decoding them, and how far it is from what an edit asks for.

The flow's encoder makes a rough mel of codes, the vocoder's F0 predictor reads it. Five measures, as MEASURES: what
emotions, styles and speeds differ in. Knows nothing about language models, prompts or files.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.codes import Codes, pairs_of
from shared.models.flow.flow import Flow
from shared.models.spectral import F0Predictor

Floats = npt.NDArray[np.float64]

MEASURES = ("log_f0", "log_f0_range", "log_duration", "level_db", "voiced_share")
"""Median and range between the tenths (semitones) of F0, frames of speech, level of its louder half below its loudest
frame, share of the frames that are voiced."""
SCALES = np.array([0.08, 0.3, 0.08, 1.5, 0.2])
"""What counts as one step of each."""
AIMS = np.array([1.2, 1.3, 1.1, 1.0, 1.1])
"""How much of an asked change is aimed at: the flow flattens what the codes say."""
FURTHEST = 3.0
"""Steps; what is further away is as bad as this."""
QUIET_DB = 40.0
"""Frames so far below the loudest are no speech where they lie at the ends."""
WHISPERED = 0.4
"""Of the source's voiced share: what is asked to be less is whispered, and only its duration and voicing count."""
ONLY_VOICED = [0, 1, 3]
FEWEST_VOICED, FEWEST_FRAMES = 5, 4


class Prosody:
    """Measures audio tokens."""

    def __init__(self, flow: Flow, f0: F0Predictor) -> None:
        self._flow, self._f0 = flow, f0

    @torch.inference_mode()
    def __call__(self, answers: Sequence[Codes]) -> Floats:
        """Mixed ids (n_k,) each -> (K, 5) as MEASURES; NaN where an answer has too little of what is measured."""
        pairs, lengths = (x.to(next(self._f0.parameters()).device) for x in pairs_of(answers))
        rough = self._flow.encode(pairs, lengths).float()
        spoken = [rough[k, :count] for k, count in enumerate((self._flow.frames_per_token * lengths).tolist())]
        return np.array([measured(self._pitch(mel), mel.exp().square().sum(-1).cpu().numpy()) for mel in spoken])

    def _pitch(self, mel: Tensor) -> Floats:
        """F0 in Hz (T,) of a mel (T, 80). Alone, since the predictor would hear what fills up a batch."""
        return np.asarray(self._f0.decode(mel.T[None])[0].cpu().numpy()) if len(mel) else np.zeros(0)


def measured(f0: Floats, power: Floats) -> Floats:
    """The measures (5,) of F0 in Hz (0 where unvoiced) and power by frame, both (T,), from the first frame of speech to
    the last."""
    result = np.full(len(MEASURES), np.nan)
    if len(power) < FEWEST_FRAMES:
        return result
    level = 10 * np.log10(power + 1e-9)
    loud = np.flatnonzero(level > level.max() - QUIET_DB)
    f0, level = f0[loud[0] : loud[-1] + 1], level[loud[0] : loud[-1] + 1]
    voiced = f0[f0 > 0]
    if len(voiced) >= FEWEST_VOICED:
        low, middle, high = np.percentile(voiced, [10, 50, 90])
        result[:2] = np.log(middle), np.log(max(12 * np.log2(high / low), 0.5))
    louder_half = np.sort(level)[len(level) // 2 :]
    result[2] = np.log(len(level))
    result[3] = 10 * np.log10(np.mean(10 ** (louder_half / 10))) - level.max()
    result[4] = len(voiced) / len(f0)
    return result


def distances(source: Floats, change: Floats, answers: Floats) -> Floats:
    """How far answers (K, 5) are from a source (5,) changed as asked (5,), mean steps over all measures, (K,)."""
    steps = np.abs(answers - source - AIMS * change) / SCALES
    if source[4] + change[4] < WHISPERED * source[4]:
        steps[:, ONLY_VOICED] = 0.0
    mean: Floats = np.nan_to_num(np.minimum(steps, FURTHEST), nan=FURTHEST).mean(1)
    return mean
