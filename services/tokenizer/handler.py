"""The tokenize step: a recording in, its codes, speaker embedding and reference mel out.

Knows no bus, store or server.
"""

from __future__ import annotations

import time

import numpy as np

from shared.artifacts import Tokenized
from shared.audio.io import read_audio
from shared.inference.port import Inference
from shared.schemas.route import TOKENS, StepKind
from shared.steps import StepContext

MODEL = "tokenizer"


class TokenizeHandler:
    """Reads the step's audio, a user's upload or the last iteration's result, and writes a Tokenized artifact."""

    kind: StepKind = "tokenize"

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    def run(self, step: StepContext) -> None:
        """Raises UserError for a recording that cannot be used."""
        recording = read_audio(step.read("audio"), name="The recording")
        step.progress(0.1, "reading the recording")
        began = time.perf_counter()
        codes = self._inference.infer(
            MODEL,
            {"audio": recording.samples},
            parameters={"sample_rate_hz": recording.sample_rate_hz, **step.step.parameters},
            deadline=step.deadline,
            cancelled=step.cancelled,
            priority=step.priority,
        )
        tokenized = Tokenized(
            linguistic=codes["linguistic"].astype(np.int32),
            semantic=codes["semantic"].astype(np.int32),
            speaker_embedding=codes["speaker_embedding"].astype(np.float32),
            prompt_mel=codes["prompt_mel"].astype(np.float32),
            duration_s=recording.duration_s,
        )
        step.write(TOKENS, tokenized.to_bytes())
        step.measure("audio_s", recording.duration_s)
        step.measure("rtf", (time.perf_counter() - began) / recording.duration_s)
