"""A checkpoint as a system under test, over the inference port: tokenize, generate (and score), decode.

Calls from many threads share the batches of the models behind the port. Knows nothing about judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class PortSystem:
    """Clones and edits by the models "tokenizer", "llm" and "decoder". Lengths are bounded by what is spoken.

    Of `n_best` answers to an edit the one that the model "reward" scores highest is decoded.
    """

    inference: Inference
    tokenizer: TextTokenizer
    decode_steps: int = 10
    temperature: float | None = None
    n_best: int = 1
    sampling: dict[str, Any] = field(default_factory=dict)

    def clone(self, reference: Waveform, reference_text: str, text: str, seed: int) -> Waveform:
        found = self.tokenize(reference)
        stretch = 2.0 * len(text) / max(1, len(reference_text))
        limit = bounds_for(len(found.mixed), stretch, 12)
        [mixed] = self.answers(clone_turns(reference_text, found.mixed, text), limit, [seed])
        return self.decode(mixed, found, seed)

    def edit(self, source: Waveform, text: str, edit: Edit, seed: int) -> Waveform:
        found = self.tokenize(source)
        turns, limit = edit_turns(edit, text, found.mixed), bounds_for(len(found.mixed), 2.0, 12)
        answers = self.answers(turns, limit, [seed + number * SEED_STRIDE for number in range(self.n_best)])
        return self.decode(self._best(turns, answers), found, seed)

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

    def answers(self, turns: Sequence[Turn], max_groups: int, seeds: Sequence[int]) -> list[Codes]:
        """One answer per seed, drawn side by side."""
        prompt = np.asarray(self.tokenizer.encode_chat(turns), np.int64)

        def one(seed: int) -> Codes:
            parameters = given(temperature=self.temperature, max_groups=max_groups, seed=seed, **self.sampling)
            return np.asarray(self.inference.infer("llm", {"prompt": prompt}, parameters=parameters)["mixed"])

        with ThreadPoolExecutor(len(seeds)) as pool:
            return list(pool.map(one, seeds))

    def _best(self, turns: Sequence[Turn], answers: Sequence[Codes]) -> Codes:
        spoken = [mixed for mixed in answers if len(mixed) >= GROUP] or list(answers)
        if len(spoken) == 1:
            return spoken[0]
        prompt = np.asarray(self.tokenizer.encode_chat(turns), np.int64)
        scores = [self.inference.infer("reward", {"prompt": prompt, "mixed": mixed})["score"] for mixed in spoken]
        return spoken[int(np.argmax([float(score) for score in scores]))]
