"""The sampler of this service inside vLLM: grammar, lengths, repetition rule and draws of services.llm.sampling.

vLLM's own sampling knows neither the order of audio tokens nor the repetition rule, so it is not used: a logits
processor draws the token and leaves nothing else to choose from, and vLLM, asked for the likeliest token, takes it.
Written for the interface `vllm.v1.sample.logits_processor` (vLLM 0.32, model runner V1). Importing this needs vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from services.llm.sampling import END, Logits, Sampler, SamplingSettings
from shared.codes import AUDIO_VOCAB, GROUP
from shared.errors import PermanentError

PARAMETER = "editx"
DAMAGED = 0
"""The id that is drawn where the logits hold no number: no audio token and no end, so the engine knows."""


@dataclass(frozen=True)
class Vocabulary:
    """Where a checkpoint has the audio tokens, and the id that ends a turn."""

    audio_offset: int
    eos: int


def sampling_params(settings: SamplingSettings, attempt: int, vocabulary: Vocabulary) -> SamplingParams:
    """One attempt at a sequence, as vLLM is asked for it."""
    return SamplingParams(
        temperature=0.0,                                        # take what AudioSampling leaves
        max_tokens=settings.max_groups * GROUP + 1,
        stop_token_ids=[vocabulary.eos, DAMAGED],
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={PARAMETER: {"settings": asdict(settings), "attempt": attempt, "vocabulary": asdict(vocabulary)}},
    )  # fmt: skip


class _Row:
    """One sequence of vLLM's batch. `output` is vLLM's own list of the ids so far, which grows by itself."""

    def __init__(self, asked: Mapping[str, Any], output: list[int]) -> None:
        self.vocabulary = Vocabulary(**asked["vocabulary"])
        self._sampler = Sampler(SamplingSettings(**asked["settings"]), asked["attempt"])
        self._output = output

    def draw(self, logits: Logits) -> int:
        """The id that comes next, from logits of audio tokens and END; the same however often it is asked for."""
        offset, tokens = self.vocabulary.audio_offset, self._sampler.tokens
        tokens[:] = [token - offset for token in self._output]  # vLLM may have taken the sequence up again
        try:
            mixed = self._sampler.choose(logits)
        except PermanentError:
            return DAMAGED
        return self.vocabulary.eos if mixed == END else offset + mixed


class AudioSampling(LogitsProcessor):  # type: ignore[misc]
    """Draws for the sequences that `sampling_params` asked for; others in the batch are left alone."""

    def __init__(self, vllm_config: object, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the places of sequences in the batch, in the order that vLLM prescribes: removed, added, moved."""
        if batch_update is None:
            return
        for place in batch_update.removed:
            self._rows.pop(place, None)
        for place, params, _, output in batch_update.added:
            self._rows.pop(place, None)
            if (asked := (params.extra_args or {}).get(PARAMETER)) is not None:
                self._rows[place] = _Row(asked, output)
        for one, other, direction in batch_update.moved:
            moved, replaced = self._rows.pop(one, None), self._rows.pop(other, None)
            if moved is not None:
                self._rows[other] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                self._rows[one] = replaced

    def apply(self, logits: Tensor) -> Tensor:
        """Leave one id in each row of logits (batch, vocabulary)."""
        if not self._rows:
            return logits
        places, rows = list(self._rows), list(self._rows.values())
        offset, eos = rows[0].vocabulary.audio_offset, rows[0].vocabulary.eos
        ids = [*range(offset, offset + AUDIO_VOCAB), eos]
        choices = logits[places][:, ids].float().cpu().numpy()  # one copy from the device for all rows
        drawn = [row.draw(one) for row, one in zip(rows, choices, strict=True)]
        logits[places] = -torch.inf
        logits[places, drawn] = 0.0
        return logits
