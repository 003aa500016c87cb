"""vLLM behind the interface of the built-in engine: the same tokens, the same care for bad prompts, cancels and ends.

Against the stand-in of tests/fixtures/fake_vllm.py; test_vllm_integration.py runs the real one.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from services.llm.engine import Engine
from services.llm.model import LlmModel
from services.llm.requests import EngineSettings, Generation, Outcome
from services.llm.sampling import SamplingSettings
from services.llm.settings import LlmSettings
from services.llm.vllm_engine import VllmEngine
from shared.checkpoints import Checkpoint
from shared.checkpoints.step1 import load_step1, load_text_tokenizer
from shared.codes import split
from shared.errors import MissingComponent, PermanentError, UserError
from shared.inference.port import DeadlineExceeded, InferenceRequest, InferenceUnavailable, RequestCancelled
from shared.tallies import HITS, PASSES, ROWS, counts
from tests.fixtures import fake_vllm

MakeEngine = Callable[..., VllmEngine]


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)


@pytest.fixture
def make_engine(checkpoint: Checkpoint) -> Iterator[MakeEngine]:
    made: list[VllmEngine] = []
    text = load_text_tokenizer(checkpoint)

    def make(**settings: int) -> VllmEngine:
        bounds = EngineSettings(**{"slots": 8, "context": 512, **settings})
        made.append(VllmEngine(
            checkpoint.step1_dir, vocabulary=text.vocab_size, audio_offset=text.audio_offset, eos=text.eos,
            device="cpu", settings=bounds,
        ))  # fmt: skip
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def builtin(checkpoint: Checkpoint) -> Iterator[Engine]:
    text, model = load_text_tokenizer(checkpoint), load_step1(checkpoint, dtype=torch.float32)
    engine = Engine(model, audio_offset=text.audio_offset, eos=text.eos, settings=EngineSettings(slots=8, context=512))
    yield engine
    engine.close()


def inside(engine: VllmEngine) -> fake_vllm.LLMEngine:
    found = engine._vllm
    assert isinstance(found, fake_vllm.LLMEngine)
    return found


def ask(seed: int, length: int = 30, streams: bool = False, **settings: float) -> Generation:
    prompt = np.random.default_rng(seed).integers(5, 400, length)
    chosen = SamplingSettings(seed=seed, **{"min_groups": 2, "max_groups": 6, "attempts": 1, **settings})  # type: ignore[arg-type]
    return Generation(prompt, chosen, streams=streams)


def until(condition: Callable[[], object], patience_s: float = 20.0) -> None:
    end = time.monotonic() + patience_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


VARIETY = [
    {"seed": 1}, {"seed": 2, "length": 7}, {"seed": 3, "temperature": 0.0}, {"seed": 4, "top_k": 5},
    {"seed": 5, "top_p": 0.5}, {"seed": 6, "repetition_window": 0}, {"seed": 7, "repetition_ratio": 0.0},
    {"seed": 2**63 - 1, "length": 60}, {"seed": 9, "max_groups": 1, "min_groups": 1}, {"seed": 10, "attempts": 3},
]  # fmt: skip


def test_every_way_to_sample_gives_the_tokens_of_the_built_in_engine(builtin: Engine, make_engine: MakeEngine) -> None:
    engine = make_engine(slots=3)  # fewer places than sequences: they join, leave and move in the batch
    found = [engine.submit(ask(**one)) for one in VARIETY]  # type: ignore[arg-type]
    expected = [builtin.submit(ask(**one)) for one in VARIETY]  # type: ignore[arg-type]
    for ours, theirs in zip(found, expected, strict=True):
        here, there = ours.result(), theirs.result()
        np.testing.assert_array_equal(here.mixed, there.mixed)
        assert (here.attempts, here.collapse) == (there.attempts, there.collapse)
        split(here.mixed)
    assert engine.load == (0, 0)


def test_a_sequence_that_vllm_took_off_and_on_again_goes_on_with_the_same_tokens(
    builtin: Engine, make_engine: MakeEngine
) -> None:
    engine = make_engine(slots=2)
    fake = inside(engine)
    step, seen = fake.step, list[str]()

    def step_and_preempt() -> list[object]:
        outputs = step()
        if outputs and len(seen) < 3 and not outputs[0].finished:
            seen.append(outputs[0].request_id)
            fake.preempt(seen[-1])
        return outputs

    fake.step = step_and_preempt  # type: ignore[method-assign]
    found = [engine.submit(ask(seed, max_groups=8, min_groups=8)) for seed in (1, 2)]
    for seed, generation in zip((1, 2), found, strict=True):
        expected = builtin.submit(ask(seed, max_groups=8, min_groups=8)).result()
        np.testing.assert_array_equal(generation.result().mixed, expected.mixed)
    assert len(seen) == 3


def test_a_stream_hands_out_whole_groups_and_ends_with_the_outcome(make_engine: MakeEngine) -> None:
    engine = make_engine(stream_groups=2)
    *pieces, outcome = engine.submit(ask(3, streams=True, min_groups=5, max_groups=5)).pieces()
    assert isinstance(outcome, Outcome)
    assert [len(piece) for piece in pieces] == [10, 10, 5]  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.concatenate(pieces), outcome.mixed)  # type: ignore[arg-type]


def test_a_collapsed_sequence_is_drawn_anew_under_another_name(builtin: Engine, make_engine: MakeEngine) -> None:
    engine = make_engine()
    outcome = engine.submit(ask(1, attempts=3, min_groups=3, max_groups=3)).result()
    expected = builtin.submit(ask(1, attempts=3, min_groups=3, max_groups=3)).result()
    assert (outcome.attempts, outcome.collapse) == (3, "no_end")
    np.testing.assert_array_equal(outcome.mixed, expected.mixed)


def test_cancelled_and_late_sequences_are_taken_out_of_vllm_and_out_of_the_line(make_engine: MakeEngine) -> None:
    engine = make_engine(slots=1)
    endless = {"min_groups": 80, "max_groups": 80}
    running, waiting, late = ask(1, **endless), ask(2), ask(3)
    late.deadline = time.monotonic() + 0.05
    for one in (running, waiting, late):
        engine.submit(one)
    until(lambda: engine.load[0] == 1)
    waiting.cancel()
    with pytest.raises(RequestCancelled):
        waiting.result()
    with pytest.raises(DeadlineExceeded):
        late.result()
    running.cancel()
    with pytest.raises(RequestCancelled):
        running.result()
    until(lambda: engine.load == (0, 0))
    assert inside(engine).aborted == ["1-0"]
    split(engine.submit(ask(4)).result().mixed)


def test_logits_without_a_number_fail_their_own_sequence_alone(make_engine: MakeEngine) -> None:
    engine = make_engine()
    inside(engine).spoil.add("1-0")
    damaged, healthy = engine.submit(ask(1)), engine.submit(ask(2))
    with pytest.raises(PermanentError, match="no usable number at token 0") as error:
        damaged.result()
    assert error.value.code == "bad_logits"
    split(healthy.result().mixed)


def test_a_step_that_breaks_fails_what_ran_and_the_next_sequence_is_served(make_engine: MakeEngine) -> None:
    engine = make_engine()
    inside(engine).break_next = True
    with pytest.raises(RuntimeError, match="fell off"):
        engine.submit(ask(1)).result()
    split(engine.submit(ask(2)).result().mixed)


def test_prompts_that_do_not_fit_and_a_full_line_are_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(slots=1, queue_limit=1)
    for prompt in (np.zeros(0, np.int64), np.array([10**6]), np.ones(511, np.int64)):
        with pytest.raises(UserError):
            engine.submit(Generation(prompt, SamplingSettings()))
    engine.submit(ask(1, min_groups=80, max_groups=80))
    until(lambda: engine.load == (1, 0))
    engine.submit(ask(2))
    with pytest.raises(InferenceUnavailable, match="1 generations wait"):
        engine.submit(ask(3))


def test_closing_ends_vllm_and_fails_what_is_unfinished(make_engine: MakeEngine) -> None:
    engine = make_engine(slots=1)
    unfinished = [engine.submit(ask(seed, min_groups=80, max_groups=80)) for seed in (1, 2)]
    until(lambda: engine.load == (1, 1))
    closing = threading.Thread(target=engine.close)
    closing.start()
    for generation in unfinished:
        with pytest.raises(InferenceUnavailable):
            generation.result()
    closing.join()
    assert inside(engine).is_shut_down
    with pytest.raises(InferenceUnavailable):
        engine.submit(ask(3))


def test_batches_and_reused_prompts_are_counted(make_engine: MakeEngine) -> None:
    tallies = ((PASSES, "llm"), (ROWS, "llm"), (HITS, "prompt tokens"))
    before = [counts(tally).get(name, 0) for tally, name in tallies]
    engine = make_engine()
    for _ in range(2):
        engine.submit(ask(1, length=40, min_groups=2, max_groups=2)).result()
    after = [counts(tally).get(name, 0) for tally, name in tallies]
    assert [late - early for early, late in zip(before, after, strict=True)] == [22, 22, 39]  # ten tokens and the end
    assert engine.prefix_hits == 39


def test_vllm_is_asked_for_what_step1_and_the_settings_need(checkpoint: Checkpoint) -> None:
    settings = LlmSettings(engine="vllm", dtype="float32", slots=5, context=256, prefix_cache_tokens=0,
                           vllm_memory_share=0.5, vllm_cache_gib=0.25)  # fmt: skip
    model = LlmModel(checkpoint, device="cpu", settings=settings)
    args = fake_vllm.LLMEngine.made[-1].args
    model.close()
    assert (args.model, args.dtype, args.max_num_seqs, args.max_model_len) == (
        str(checkpoint.step1_dir), "float32", 5, 256
    )  # fmt: skip
    assert (args.gpu_memory_utilization, args.kv_cache_memory_bytes) == (0.5, 1 << 28)
    assert args.enable_prefix_caching is False
    assert (args.attention_backend, args.hf_overrides) == ("TRITON_ATTN", {"tie_word_embeddings": False})
    assert (args.async_scheduling, args.skip_tokenizer_init) == (False, True)


def test_the_served_model_answers_with_either_engine_alike(checkpoint: Checkpoint) -> None:
    prompt = np.random.default_rng(0).integers(5, 400, 40)
    bounds = {"min_groups": 2, "max_groups": 5}
    requests = [InferenceRequest({"prompt": prompt}, {"seed": seed, **bounds}) for seed in (1, 2)]
    answers = []
    for engine in ("builtin", "vllm"):
        settings = LlmSettings(engine=engine, dtype="float32", quantize="none", slots=4, context=256)  # type: ignore[arg-type]
        model = LlmModel(checkpoint, settings=settings)
        answers.append(model.infer(requests))
        pieces = list(model.stream(requests[0]))
        assert sum(len(piece["mixed"]) for piece in pieces) % 5 == 0
        model.close()
    for builtin, vllm in zip(*answers, strict=True):
        assert not isinstance(builtin, Exception)
        assert not isinstance(vllm, Exception)
        for name, value in builtin.items():
            np.testing.assert_array_equal(value, vllm[name])


def test_what_vllm_cannot_do_is_refused_with_what_to_do_instead(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = LlmSettings(engine="vllm", dtype="float32")
    with pytest.raises(UserError, match="EDITX_LLM_QUANTIZE=int8"):
        LlmModel(checkpoint, settings=LlmSettings(engine="vllm", quantize="int8"))
    for device in ("cuda", "cpu:1"):
        with pytest.raises(UserError, match="runs on cpu here"):
            LlmModel(checkpoint, device=device, settings=settings)

    def no_kernels(engine_args: object) -> None:
        raise ValueError("use_alibi_sqrt is not supported by backend CPU_ATTN.")

    monkeypatch.setattr(fake_vllm.LLMEngine, "from_engine_args", no_kernels)
    with pytest.raises(UserError, match="use_alibi_sqrt is not supported"):
        LlmModel(checkpoint, settings=settings)


def test_without_vllm_the_setting_says_what_to_install(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingComponent, match=r"vllm.*EDITX_LLM_ENGINE=vllm needs it"):
        LlmModel(checkpoint, settings=LlmSettings(engine="vllm"))
