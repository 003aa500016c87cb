"""The language model as a served unit: a prompt's ids in, audio tokens out, whole or in pieces.

Runs in process and behind a model server. It may be called by many threads at once: all calls share one running batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from services.llm.choice import AskedManner, Choice, Chosen, seeds
from services.llm.engine import Engine
from services.llm.requests import EngineSettings, Generation, GenerationEngine, Outcome
from services.llm.sampling import SamplingSettings
from services.llm.settings import LlmSettings
from shared.checkpoints import Checkpoint
from shared.checkpoints.prosody import load_prosody
from shared.checkpoints.recognizer import load_recognizer
from shared.checkpoints.step1 import Quantize, load_config, load_step1, load_text_tokenizer
from shared.checkpoints.weights import default_dtype
from shared.codes import Codes, split
from shared.errors import UserError
from shared.inference.port import InferenceRequest, Parameters, Tensors
from shared.models.quantize import HalfLinear
from shared.models.step1 import Step1Config
from shared.prompts import TextTokenizer
from shared.settings import from_environment

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LlmModel:
    """The model "llm".

    Inputs "prompt": int64 (n,), a chat of shared.prompts as ids; "text", optional: int32 (k,), what the answer should
    say, as code points. With it a checkpoint that has a recogniser draws several answers and gives the one that says
    it best (`LlmSettings.candidates`), unless it streams. "spoken", optional: int32 (k,), mixed ids of a recording
    whose words the answer should keep: the recogniser reads them where "text" is not told. "against", optional: int64
    (m,), the chat of what the answer should not end up as, from which draws are guided away by `guidance`, the
    checkpoint's unless told; a guided answer counts as two. "manner", optional: int32 (k,), code points of a manner
    such as "emotion/happy", which counts in the choice beside the words where the checkpoint says what it changes of
    "spoken". Parameters: the fields of SamplingSettings, all optional.
    Outputs "mixed" int32 (m,), whole groups; "attempts" int32 (); "collapsed" bool (), true when the last attempt still
    looped or found no end; "stretch" float32 (), how much slower than its tokens the answer to a known manner should be
    said, 1 of any other.
    """

    name = "llm"

    def __init__(
        self, checkpoint: Checkpoint, *, device: str | None = None, settings: LlmSettings | None = None
    ) -> None:
        """Load the checkpoint's language model. `device` overrules the settings'."""
        chosen = settings or from_environment(LlmSettings)
        make = _vllm_engine if chosen.engine == "vllm" else _builtin_engine
        self.engine = make(checkpoint, device or chosen.device, chosen)
        metadata = checkpoint.metadata
        guidance = metadata.guidance if chosen.guidance is None else chosen.guidance
        self._defaults: dict[str, float] = {"guidance": guidance} if self.engine.guides else {}
        if metadata.temperature is not None:
            self._defaults["temperature"] = metadata.temperature
        candidates = chosen.candidates or metadata.candidates
        reads = candidates > 1 and checkpoint.has_recognizer
        prosody = partial(load_prosody, checkpoint)
        self._choice = Choice(load_recognizer(checkpoint), candidates, prosody) if reads else None
        self._manners = {name: np.array(change) for name, change in metadata.manners.items()}

    def infer(self, requests: Sequence[InferenceRequest]) -> list[Tensors | Exception]:
        """One answer per request; they run side by side and need not be alike in anything."""
        submitted = [self._submitted(request) for request in requests]
        return [one if isinstance(one, Exception) else self._answer(*one) for one in submitted]

    def stream(self, request: InferenceRequest) -> Iterator[Tensors]:
        """The tokens in pieces of whole groups, each as soon as it is drawn; "collapsed" is true in the last at most.

        A stream is not drawn anew once a piece is out. Closing the iterator stops the work.
        """
        [generation] = self._submit(request, [self._sampling(request)], streams=True)
        for piece in generation.pieces():
            yield _tensors(piece, 1, False) if isinstance(piece, np.ndarray) else _last(piece)

    def close(self) -> None:
        """Stop the engine's thread; unfinished requests fail."""
        self.engine.close()

    def _submitted(self, request: InferenceRequest) -> tuple[list[Generation], str, AskedManner | None] | Exception:
        """The draws of a request, the text that they should say and the manner that they should show."""
        try:
            settings, text, manner = self._sampling(request), _text(request), self._manner(request)
            if self._choice and not text and "spoken" in request.inputs:
                text = self._choice.read(_spoken(request))
            count = self._choice.count(text) if self._choice else 1
            if _against(request, settings) is not None:
                count = max(1, count // 2)  # a guided answer is the work of two
            drawn = [replace(settings, seed=seed) for seed in seeds(settings.seed, count)]
            return self._submit(request, drawn, streams=False), text, manner
        except Exception as error:
            return error

    def _manner(self, request: InferenceRequest) -> AskedManner | None:
        """The manner that is asked for, where it is known what it changes."""
        change = self._manners.get(_text(request, "manner"))
        return None if change is None or "spoken" not in request.inputs else AskedManner(_spoken(request), change)

    def _sampling(self, request: InferenceRequest) -> SamplingSettings:
        return sampling_settings({**self._defaults, **request.parameters})

    def _submit(
        self, request: InferenceRequest, drawn: Sequence[SamplingSettings], *, streams: bool
    ) -> list[Generation]:
        """One generation for each of the settings, all of them or none."""
        prompt, against = _ids(request, "prompt"), _against(request, drawn[0])
        generations: list[Generation] = []
        try:
            for settings in drawn:
                generations.append(self.engine.submit(Generation(
                    prompt, settings, deadline=request.deadline, cancelled=request.cancelled,
                    priority=request.priority, streams=streams, against=against,
                )))  # fmt: skip
        except Exception:
            for generation in generations:
                generation.cancel()
            raise
        return generations

    def _answer(self, generations: Sequence[Generation], text: str, manner: AskedManner | None) -> Tensors | Exception:
        try:
            outcomes = [generation.result() for generation in generations]
            chosen = self._choice.best(outcomes, text, manner) if self._choice else Chosen(outcomes[0])
        except Exception as error:
            for generation in generations:
                generation.cancel()
            return error
        outcome = chosen.outcome
        return _tensors(outcome.mixed, outcome.attempts, outcome.collapse is not None, chosen.stretch)


def _builtin_engine(checkpoint: Checkpoint, device: str, chosen: LlmSettings) -> GenerationEngine:
    dtype = DTYPES[chosen.dtype] or default_dtype(device)
    model = load_step1(checkpoint, dtype=dtype, device=device, quantize=_quantize(chosen.quantize, dtype, device))
    text = _text_tokenizer(checkpoint, model.config)
    return Engine(model, audio_offset=text.audio_offset, eos=text.eos, settings=_bounds(chosen, model.config))


def _quantize(asked: str, dtype: torch.dtype, device: str) -> Quantize:
    """How to shrink the weights. Raises UserError for float16 ones where no kernel takes them."""
    works = HalfLinear.works(dtype, device)
    if asked == "half" and not works:
        raise UserError(
            "EDITX_LLM_QUANTIZE=half is for x86 CPUs and float32 activations.",
            "Leave it out, or set EDITX_LLM_DTYPE=float32 and EDITX_LLM_DEVICE=cpu.", "invalid_setting",
        )  # fmt: skip
    if asked == "half" or (asked == "auto" and works):
        return "half"
    return "int8" if asked == "int8" else None


def _vllm_engine(checkpoint: Checkpoint, device: str, chosen: LlmSettings) -> GenerationEngine:
    if chosen.quantize not in ("auto", "none"):
        raise UserError(f"EDITX_LLM_QUANTIZE={chosen.quantize} is for the built-in engine.",
                        "Leave it out, or set EDITX_LLM_ENGINE=builtin.", "invalid_setting")  # fmt: skip
    from services.llm.vllm_engine import VllmEngine, VllmSettings

    config = load_config(checkpoint)
    text = _text_tokenizer(checkpoint, config)
    return VllmEngine(
        checkpoint.step1_dir, vocabulary=config.vocab_size, audio_offset=text.audio_offset, eos=text.eos, device=device,
        settings=_bounds(chosen, config),
        vllm=VllmSettings(chosen.dtype, chosen.vllm_memory_share, chosen.vllm_cache_gib),
    )  # fmt: skip


def _text_tokenizer(checkpoint: Checkpoint, config: Step1Config) -> TextTokenizer:
    text = load_text_tokenizer(checkpoint)
    if text.vocab_size > config.vocab_size:
        raise UserError(
            f"The text tokenizer has {text.vocab_size} pieces, the language model {config.vocab_size}.",
            "Take both from the same release.", "checkpoint_invalid",
        )  # fmt: skip
    return text


def _bounds(chosen: LlmSettings, config: Step1Config) -> EngineSettings:
    return EngineSettings(
        slots=chosen.slots,
        context=min(chosen.context, config.max_seq_len),
        queue_limit=chosen.queue_limit,
        prefix_cache_tokens=chosen.prefix_cache_tokens,
        stream_groups=chosen.stream_groups,
    )


def sampling_settings(parameters: Parameters) -> SamplingSettings:
    """The sampling fields among a request's parameters; others are ignored. Raises UserError for a wrong one."""
    values: dict[str, Any] = {}
    for known in fields(SamplingSettings):
        if known.name not in parameters:
            continue
        kind = float if known.type == "float" else int
        try:
            values[known.name] = kind(parameters[known.name])
        except ValueError as error:
            raise UserError(
                f"The parameter {known.name} is {parameters[known.name]!r}, not a number.",
                "Leave it out for the default.", "invalid_sampling",
            ) from error  # fmt: skip
    return SamplingSettings(**values)


def _ids(request: InferenceRequest, name: str) -> npt.NDArray[np.int64]:
    return np.ascontiguousarray(request.inputs[name], dtype=np.int64).reshape(-1)


def _against(request: InferenceRequest, settings: SamplingSettings) -> npt.NDArray[np.int64] | None:
    """The prompt that the draws are guided away from, where they are."""
    return _ids(request, "against") if settings.guidance and "against" in request.inputs else None


def _text(request: InferenceRequest, name: str = "text") -> str:
    """A text of the request, by default what the answer should say; empty where there is none. Raises UserError."""
    try:
        return "".join(map(chr, np.asarray(request.inputs.get(name, [])).reshape(-1).tolist()))
    except (ValueError, OverflowError, TypeError) as error:
        raise UserError(f"The {name} is no list of Unicode code points.", "", "invalid_text") from error


def _spoken(request: InferenceRequest) -> Codes:
    """Whole groups of mixed ids. Raises UserError where they are none."""
    mixed = np.asarray(request.inputs["spoken"], np.int32).reshape(-1)
    split(mixed)
    return mixed


def _last(outcome: Outcome) -> Tensors:
    return _tensors(np.zeros(0, dtype=np.int32), outcome.attempts, outcome.collapse is not None)


def _tensors(mixed: np.ndarray[Any, Any], attempts: int, collapsed: bool, stretch: float = 1.0) -> Tensors:
    return {
        "mixed": mixed,
        "attempts": np.array(attempts, dtype=np.int32),
        "collapsed": np.array(collapsed),
        "stretch": np.array(stretch, dtype=np.float32),
    }
