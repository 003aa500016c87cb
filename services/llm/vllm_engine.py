"""vLLM as the engine of the language model: for GPUs and loads beyond what the built-in engine is written for.

Takes the same generations and gives the same outcomes as services.llm.engine: prompts are ids, sampling is this
service's own (services.llm.vllm_sampling), and collapsed sequences are drawn anew. One thread owns vLLM, which runs in
this process. What differs: decode rows need not have the same bits in any batch, so a seed may give other tokens in
other company. Written for vLLM 0.32 (`LLMEngine`, model runner V1); vLLM is imported when an engine is made.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from services.llm.requests import IDLE_S, Draft, EngineSettings, Generation, GenerationEngine, Outcome
from shared.codes import AUDIO_VOCAB
from shared.errors import MissingComponent, PermanentError, UserError
from shared.inference.port import InferenceUnavailable
from shared.tallies import looked_up, passed

GIB = 1 << 30
STEP1 = "Step1ForCausalLM"
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's core in this process, stepped by our thread
    "VLLM_USE_V2_MODEL_RUNNER": "0",        # the logits processor speaks the interface of V1
    "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip


@dataclass(frozen=True)
class VllmSettings:
    """What only vLLM needs to know. `cache_gib` 0: the keys and values get what `memory_share` leaves."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    memory_share: float = 0.9
    cache_gib: float = 0.0


class _Sequence(Draft):
    """A generation that vLLM works on, under a name that is new for each attempt."""

    def __init__(self, generation: Generation, number: int) -> None:
        super().__init__(generation)
        self._number = number
        self.told_cached = False

    @property
    def name(self) -> str:
        return f"{self._number}-{self.sampler.attempt}"


class VllmEngine(GenerationEngine):
    """An engine over vLLM; close it to stop its thread and free the device.

    `folder` holds config.json and the weights, `audio_offset` is the id of mixed id 0, `eos` the id that ends a turn.
    Raises MissingComponent where vLLM is not installed, UserError where it has no kernels for the device or the model.
    """

    def __init__(
        self, folder: Path, *, vocabulary: int, audio_offset: int, eos: int, device: str,
        settings: EngineSettings | None = None, vllm: VllmSettings | None = None,
    ) -> None:  # fmt: skip
        super().__init__(vocabulary, settings)
        self._vllm = _start(folder, device, self.settings, vllm or VllmSettings())
        from services.llm import vllm_sampling

        self._params = vllm_sampling.sampling_params
        self._vocabulary = vllm_sampling.Vocabulary(audio_offset, eos)
        self._running: dict[str, _Sequence] = {}
        self._count = 0
        self._hits = 0
        self._begin_work()

    @property
    def prefix_hits(self) -> int:
        """Prompt tokens that came out of vLLM's prefix cache so far."""
        return self._hits

    def _loop(self) -> None:
        while self._waiting.is_open:
            try:
                self._drop_refused()
                self._admit()
                if self._running:
                    self._step()
            except Exception as error:
                self._fail_all(error)
        self._fail_all(InferenceUnavailable("The language model was closed."))
        self._waiting.fail(InferenceUnavailable("The language model was closed."))
        self._vllm.engine_core.shutdown()

    def _drop_refused(self) -> None:
        for sequence in list(self._running.values()):
            if refusal := sequence.generation.refusal:
                self._abort(sequence)
                sequence.generation.put(refusal)
        self._waiting.drop_refused()

    def _admit(self) -> None:
        if not self._running:
            self._waiting.wait(IDLE_S)
        while len(self._running) < self.settings.slots and (generation := self._waiting.pop()):
            self._count += 1
            self._begin(_Sequence(generation, self._count))

    def _begin(self, sequence: _Sequence) -> None:
        generation = sequence.generation
        params = self._params(generation.settings, sequence.sampler.attempt, self._vocabulary)
        try:
            self._vllm.add_request(sequence.name, {"prompt_token_ids": generation.prompt.tolist()}, params)
        except Exception as error:
            generation.put(error)
            return
        sequence.told_cached = False
        self._running[sequence.name] = sequence

    def _step(self) -> None:
        outputs = self._vllm.step()
        if outputs:
            passed("llm", len(outputs))
        for output in outputs:
            if (sequence := self._running.get(output.request_id)) is not None:
                self._take(sequence, output)

    def _take(self, sequence: _Sequence, output: Any) -> None:
        """The newest ids of a sequence: hand them out, finish, or start over."""
        if not sequence.told_cached:
            hits, length = output.num_cached_tokens or 0, len(sequence.generation.prompt)
            looked_up("prompt tokens", hits=hits, misses=length - hits)
            self._hits += hits
            sequence.told_cached = True
        for token in output.outputs[0].token_ids:
            if not self._settle(sequence, token, output.finished):
                return
        if output.finished:
            self._leave(sequence, PermanentError(
                f"vLLM ended a sequence at token {len(sequence.sampler.tokens)}: {output.outputs[0].finish_reason}.",
                "See the log of the llm service.", "generation_broke_off"))  # fmt: skip

    def _settle(self, sequence: _Sequence, token: int, finished: bool) -> bool:
        """After one more id: whether the sequence goes on under the same name."""
        mixed, ended = token - self._vocabulary.audio_offset, token == self._vocabulary.eos
        if not ended and not 0 <= mixed < AUDIO_VOCAB:
            self._leave(sequence, PermanentError(
                f"The language model gave no usable number at token {len(sequence.sampler.tokens)}.",
                "The checkpoint is damaged or its dtype overflows: verify it, or load it in float32.", "bad_logits",
            ))  # fmt: skip
            return False
        if not ended:
            sequence.sampler.tokens.append(mixed)
        collapse = sequence.collapse(ended)
        if not ended and not collapse:
            sequence.send(self.settings.stream_groups)
            return True
        self._abort(sequence, finished)
        if collapse and sequence.start_over():
            self._begin(sequence)
        else:
            sequence.send(1, rest=True)
            sequence.generation.put(sequence.outcome(collapse))
        return False

    def _abort(self, sequence: _Sequence, finished: bool = False) -> None:
        del self._running[sequence.name]
        if not finished:
            self._vllm.abort_request([sequence.name])

    def _leave(self, sequence: _Sequence, last: Outcome | Exception) -> None:
        del self._running[sequence.name]
        sequence.generation.put(last)

    def _fail_all(self, error: Exception) -> None:
        names, sequences = list(self._running), list(self._running.values())
        self._running.clear()
        for sequence in sequences:
            sequence.generation.put(error)
        with suppress(Exception):  # what broke a step may break this too
            self._vllm.abort_request(names)


def _start(folder: Path, device: str, bounds: EngineSettings, settings: VllmSettings) -> Any:
    """vLLM's engine over the checkpoint in `folder`."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform
    except ImportError as error:
        raise MissingComponent(
            f"The package {error.name}", "EDITX_LLM_ENGINE=vllm needs it",
            "Install vLLM in an environment of its own (docs/operations.md), or set EDITX_LLM_ENGINE=builtin.",
        ) from error  # fmt: skip
    wanted = torch.device(device)
    if wanted.type != current_platform.device_type or wanted.index:
        raise UserError(
            f"vLLM runs on {current_platform.device_type} here, and on its first device; the setting says {device}.",
            "Set EDITX_DEVICE so, and show the process one GPU with CUDA_VISIBLE_DEVICES.", "invalid_setting",
        )  # fmt: skip
    is_step1 = STEP1 in json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures", [])
    if is_step1:
        _register_step1()
    try:
        return LLMEngine.from_engine_args(EngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype=settings.dtype,
            max_model_len=bounds.context,
            max_num_seqs=bounds.slots,
            gpu_memory_utilization=settings.memory_share,
            kv_cache_memory_bytes=int(settings.cache_gib * GIB) or None,
            enable_prefix_caching=bounds.prefix_cache_tokens > 0,
            logits_processors=["services.llm.vllm_sampling:AudioSampling"],
            attention_backend="TRITON_ATTN" if is_step1 else None,  # the one with square-root ALiBi
            hf_overrides={"tie_word_embeddings": False} if is_step1 else {},  # vLLM would tie where nothing is said
            generation_config="vllm",                           # no defaults for sampling out of the folder
            enforce_eager=wanted.type == "cpu",                 # compiling pays on GPUs only
            async_scheduling=False,                             # each draw must see the one before
            disable_log_stats=True,
        ))  # fmt: skip
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"vLLM cannot run the checkpoint in {folder} on {device}: {error}",
                        "Set EDITX_LLM_ENGINE=builtin, or see docs/operations.md for what it needs.",
                        "engine_unsupported") from error  # fmt: skip


def _register_step1() -> None:
    """Make config.json of Step1 known under its name, so that no code of a checkpoint has to be run."""
    from transformers import AutoConfig, PretrainedConfig

    config = type("Step1HfConfig", (PretrainedConfig,), {"model_type": "step1"})
    AutoConfig.register("step1", config, exist_ok=True)
