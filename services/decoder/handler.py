"""The decode step: audio tokens and the reference in, a waveform out. Knows no bus, store or server."""

from __future__ import annotations

import time

import numpy as np

from shared.artifacts import Generated, Tokenized
from shared.audio.io import Waveform, write_audio
from shared.errors import PermanentError
from shared.inference.port import Inference, given
from shared.schemas.route import AUDIO, StepKind
from shared.steps import StepContext

MODEL = "decoder"
SAMPLE_RATE_HZ = 24_000
CONTENT_TYPES = {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg", "opus": "audio/ogg"}


class DecodeHandler:
    """Turns generated tokens into 24 kHz audio with the voice of the step's reference."""

    kind: StepKind = "decode"

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    def run(self, step: StepContext) -> None:
        """Writes audio.wav, which the next iteration reads, and the format that was asked for beside it."""
        parameters = step.step.parameters
        generated = Generated.from_bytes(step.read("generated"))
        reference = Tokenized.from_bytes(step.read("tokens"))
        step.progress(0.05, "decoding")
        began = time.perf_counter()
        answer = self._inference.infer(
            MODEL,
            {
                "mixed": generated.mixed,
                "prompt_mixed": reference.mixed,
                "prompt_mel": reference.prompt_mel,
                "speaker_embedding": reference.speaker_embedding,
            },
            parameters=given(
                steps=parameters["steps"], cfg=parameters["cfg"], seed=parameters["seed"], stretch=generated.stretch
            ),
            deadline=step.deadline,
            cancelled=step.cancelled,
            priority=step.priority,
        )
        audio = answer["audio"].astype(np.float32).reshape(-1)
        if not audio.size or not np.isfinite(audio).all():
            raise PermanentError("The decoder made no sound.", "Try another seed or fewer steps.", "no_audio_decoded")
        waveform = Waveform(audio, SAMPLE_RATE_HZ)
        for form in dict.fromkeys(("wav", str(parameters["format"]))):
            name = AUDIO if form == "wav" else f"audio.{form}"
            step.write(name, write_audio(waveform, None, form) or b"", CONTENT_TYPES[form])
        step.measure("audio_s", waveform.duration_s)
        step.measure("rtf", (time.perf_counter() - began) / waveform.duration_s)
