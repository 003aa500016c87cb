"""A checkpoint as a system under test, over the inference port: tokenize, generate, decode.

Calls from many threads share the batches of the models behind the port. Knows nothing about judges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from services.trainer.core.sampling import bounds_for
from shared.artifacts import Tokenized
from shared.audio.io import Waveform
from shared.codes import GROUP, Codes
from shared.errors import PermanentError
from shared.inference.port import Inference, given
from shared.prompts import TextTokenizer, Turn, clone_turns, edit_turns
from shared.schemas.edit import Edit

DECODED_RATE_HZ = 24_000


@dataclass(frozen=True)
class PortSystem:
    """Clones and edits by the models "tokenizer", "llm" and "decoder". Lengths are bounded by what is spoken."""

    inference: Inference
    tokenizer: TextTokenizer
    decode_steps: int = 10
    temperature: float | None = None
    sampling: dict[str, Any] = field(default_factory=dict)

    def clone(self, reference: Waveform, reference_text: str, text: str, seed: int) -> Waveform:
        found = self.tokenize(reference)
        stretch = 2.0 * len(text) / max(1, len(reference_text))
        limit = bounds_for(len(found.mixed), stretch, 12)
        return self._answer(clone_turns(reference_text, found.mixed, text), found, limit, seed)

    def edit(self, source: Waveform, text: str, edit: Edit, seed: int) -> Waveform:
        found = self.tokenize(source)
        return self._answer(edit_turns(edit, text, found.mixed), found, bounds_for(len(found.mixed), 2.0, 12), seed)

    def tokenize(self, waveform: Waveform) -> Tokenized:
        """Codes, speaker embedding and prompt mel of a recording."""
        found = self.inference.infer(
            "tokenizer", {"audio": waveform.samples}, parameters={"sample_rate_hz": waveform.sample_rate_hz}
        )
        return Tokenized(found["linguistic"], found["semantic"], found["speaker_embedding"], found["prompt_mel"],
                         waveform.duration_s)  # fmt: skip

    def decode(self, mixed: npt.NDArray[Any], reference: Tokenized, seed: int = 0) -> Waveform:
        """Audio tokens to a waveform in the voice of the reference. Raises PermanentError for no tokens."""
        if len(mixed) < GROUP:
            raise PermanentError("The language model gave no audio tokens.")
        inputs = {"mixed": mixed, "prompt_mixed": reference.mixed, "prompt_mel": reference.prompt_mel,
                  "speaker_embedding": reference.speaker_embedding}  # fmt: skip
        found = self.inference.infer("decoder", inputs, parameters={"steps": self.decode_steps, "seed": seed})
        return Waveform(np.asarray(found["audio"], np.float32), DECODED_RATE_HZ)

    def _answer(self, turns: list[Turn], reference: Tokenized, max_groups: int, seed: int) -> Waveform:
        prompt = np.asarray(self.tokenizer.encode_chat(turns), np.int64)
        parameters = given(temperature=self.temperature, max_groups=max_groups, seed=seed, **self.sampling)
        mixed: Codes = np.asarray(self.inference.infer("llm", {"prompt": prompt}, parameters=parameters)["mixed"])
        return self.decode(mixed, reference, seed)
