"""The vLLM engine over the real package, run by test_vllm_integration.py with the Python of vLLM's environment.

`shape`: what the stand-in of the other tests pretends is so. `llama`: a small checkpoint that vLLM runs on any machine.
`step1`: the bundled checkpoint, with an attention for CPUs that vLLM lacks, against the built-in engine.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from services.llm.requests import EngineSettings, Generation, Outcome
from services.llm.sampling import SamplingSettings
from services.llm.settings import LlmSettings
from shared.checkpoints import Checkpoint
from shared.codes import split
from shared.inference.port import InferenceRequest, RequestCancelled

OFFSET, EOS, VOCABULARY = 64, 3, 64 + 5120


def shape() -> None:
    import vllm
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.platforms import current_platform
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.core_client import EngineCoreClient
    from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

    from tests.fixtures import fake_vllm

    def names(kind: Any) -> set[str]:
        return {one.name for one in dataclasses.fields(kind)}

    assert names(fake_vllm.EngineArgs) <= names(vllm.EngineArgs)
    assert names(fake_vllm.BatchUpdate) == names(BatchUpdate)
    assert set(fake_vllm.MoveDirectionality.__members__) == set(MoveDirectionality.__members__)
    assert set(fake_vllm.RequestOutputKind.__members__) == set(RequestOutputKind.__members__)
    assert names(fake_vllm.SamplingParams) <= set(inspect.signature(vllm.SamplingParams).parameters)
    for name in ("from_engine_args", "add_request", "abort_request", "step"):
        ours, real = (inspect.signature(getattr(engine, name)) for engine in (fake_vllm.LLMEngine, vllm.LLMEngine))
        assert list(real.parameters)[: len(ours.parameters)] == list(ours.parameters), name
    assert LogitsProcessor.__abstractmethods__ == {"__init__", "apply", "is_argmax_invariant", "update_state"}
    told = set(inspect.signature(RequestOutput).parameters)
    assert {"request_id", "outputs", "finished", "num_cached_tokens"} <= told
    assert {"token_ids", "finish_reason"} <= names(CompletionOutput)
    assert hasattr(EngineCoreClient, "shutdown")
    assert current_platform.device_type in ("cpu", "cuda")


def tiny_llama(folder: Path) -> None:
    """Random weights with the names and sizes of a Llama that has this system's audio tokens."""
    hidden, layers, heads, shared, inner = 128, 2, 4, 2, 192
    head = hidden // heads
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": shared, "num_hidden_layers": layers, "head_dim": head,
        "vocab_size": VOCABULARY, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "bos_token_id": 1,
        "eos_token_id": EOS, "pad_token_id": 0, "tie_word_embeddings": False, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    sizes = {"model.embed_tokens": (VOCABULARY, hidden), "lm_head": (VOCABULARY, hidden), "model.norm": (hidden,)}
    for layer in range(layers):
        part = f"model.layers.{layer}."
        sizes |= {
            part + "self_attn.q_proj": (hidden, hidden), part + "self_attn.k_proj": (shared * head, hidden),
            part + "self_attn.v_proj": (shared * head, hidden), part + "self_attn.o_proj": (hidden, hidden),
            part + "mlp.gate_proj": (inner, hidden), part + "mlp.up_proj": (inner, hidden),
            part + "mlp.down_proj": (hidden, inner), part + "input_layernorm": (hidden,),
            part + "post_attention_layernorm": (hidden,),
        }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    weights = {f"{name}.weight": torch.ones(size) if len(size) == 1 else 0.15 * torch.randn(size, generator=generator)
               for name, size in sizes.items()}  # fmt: skip
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def llama() -> None:
    from services.llm.vllm_engine import VllmEngine, VllmSettings

    with tempfile.TemporaryDirectory() as name:
        tiny_llama(Path(name))
        engine = VllmEngine(
            Path(name), vocabulary=VOCABULARY, audio_offset=OFFSET, eos=EOS, device="cpu",
            settings=EngineSettings(slots=4, context=512, stream_groups=2),
            vllm=VllmSettings("float32", cache_gib=0.25),
        )  # fmt: skip

    def ask(seed: int, streams: bool = False, **settings: float) -> Generation:
        bounds: dict[str, Any] = {"min_groups": 3, "max_groups": 10, "attempts": 1, **settings}
        prompt = np.random.default_rng(0).integers(5, VOCABULARY, 200)
        return engine.submit(Generation(prompt, SamplingSettings(seed=seed, **bounds), streams=streams))

    first = [ask(seed) for seed in range(9)]
    found = [generation.result() for generation in first]
    for outcome in found:
        split(outcome.mixed)
        assert 15 <= len(outcome.mixed) <= 50
    assert len({tuple(outcome.mixed) for outcome in found}) == 9
    for seed, outcome in enumerate(found):
        np.testing.assert_array_equal(ask(seed).result().mixed, outcome.mixed)
    assert engine.prefix_hits >= 9 * 128
    *pieces, last = ask(1, streams=True).pieces()
    assert isinstance(last, Outcome)
    assert [len(piece) for piece in pieces[:-1]] == [10] * (len(pieces) - 1)  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.concatenate(pieces), found[1].mixed)  # type: ignore[arg-type]
    long = ask(1, min_groups=50, max_groups=50)
    while engine.load != (1, 0):
        time.sleep(0.01)
    long.cancel()
    try:
        long.result()
        raise AssertionError("a cancelled generation came to an end")
    except RequestCancelled:
        pass
    split(ask(2, attempts=3, min_groups=2, max_groups=2).result().mixed)
    engine.close()


def step1() -> None:
    from services.llm.model import LlmModel
    from tests.services.llm import vllm_attention

    vllm_attention.install()
    generator = np.random.default_rng(0)
    bounds = {"min_groups": 4, "max_groups": 20}
    ways: list[dict[str, float]] = [
        {"seed": 1}, {"seed": 2, "temperature": 0.0}, {"seed": 3, "top_p": 0.8}, {"seed": 4, "top_k": 20},
        {"seed": 5, "repetition_window": 0}, {"seed": 6, "attempts": 1},
    ]  # fmt: skip
    requests = [InferenceRequest({"prompt": generator.integers(5, 8000, length)}, {**bounds, **way})
                for way in ways for length in (150, 300)]  # fmt: skip
    answers = []
    for name in ("builtin", "vllm"):
        settings = LlmSettings(engine=name, dtype="float32", slots=5, context=1024, vllm_cache_gib=0.25)  # type: ignore[arg-type]
        model = LlmModel(Checkpoint.resolve("nano"), device="cpu", settings=settings)
        answers.append(model.infer(requests))
        model.close()
    equal = 0
    for builtin, vllm in zip(*answers, strict=True):
        assert not isinstance(builtin, Exception)
        assert not isinstance(vllm, Exception), vllm
        split(vllm["mixed"])
        equal += np.array_equal(builtin["mixed"], vllm["mixed"])
    print(f"{equal} of {len(requests)} sequences have the same tokens")
    assert equal >= len(requests) - 1  # sums in another order may tip one draw


if __name__ == "__main__":
    {"shape": shape, "llama": llama, "step1": step1}[sys.argv[1]]()
