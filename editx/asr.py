"""Writing down what a recording says, with the optional faster-whisper.

Its model is fetched by that package on first use.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from shared.audio.io import Waveform
from shared.audio.signal import resample
from shared.errors import MissingComponent, UserError

RATE_HZ = 16_000
MODEL_VARIABLE = "EDITX_ASR_MODEL"
DEFAULT_MODEL = "base"


def transcribe(recording: Waveform) -> str:
    """The words of a recording. EDITX_ASR_MODEL names the model or its folder. Raises MissingComponent, UserError."""
    samples = resample(torch.from_numpy(recording.samples), recording.sample_rate_hz, RATE_HZ).numpy()
    segments, _ = _model(os.environ.get(MODEL_VARIABLE, DEFAULT_MODEL)).transcribe(samples.astype(np.float32))
    text = " ".join(segment.text.strip() for segment in segments).strip()
    if not text:
        raise UserError("No words were heard in the recording.", "Give the text with --text.", "missing_text")
    return text


@lru_cache(maxsize=1)
def _model(name: str) -> Any:
    try:
        from faster_whisper import WhisperModel
    except ImportError as error:
        raise MissingComponent(
            "The package faster-whisper", "--asr needs it", "Install it with `pip install editx[asr]`, or give --text."
        ) from error
    try:
        return WhisperModel(name, device="cpu", compute_type="int8")
    except Exception as error:
        raise MissingComponent(
            f"The speech recognition model {name}",
            f"it could not be loaded ({' '.join(str(error).split())})",
            f"Connect to the network once, or name a local folder in {MODEL_VARIABLE}.",
        ) from error
