"""Sequences come out bit-equal alone and in company; they join, leave, stream, collapse and are refused as promised."""

import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from services.llm import engine as engine_module
from services.llm.decoding import ExactDecoder, StaticDecoder, row_multiple
from services.llm.engine import Engine
from services.llm.requests import EngineSettings, Generation, Outcome
from services.llm.sampling import END, Sampler, SamplingSettings
from services.llm.threads import threads
from shared.codes import split
from shared.errors import UserError
from shared.inference.port import DeadlineExceeded, InferenceUnavailable, RequestCancelled
from shared.models.quantize import HalfLinear, Int8Linear, replace_linears
from shared.models.step1 import Step1
from shared.tallies import HITS, MISSES, PASSES, ROWS, counts

AUDIO_OFFSET, EOS = 64, 3
NEVER_END = {"min_groups": 12, "max_groups": 12, "attempts": 1}

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    made: list[Engine] = []

    def make(model: Step1, **settings: int) -> Engine:
        bounds = EngineSettings(**{"slots": 8, "context": 1024, **settings})
        made.append(Engine(model, audio_offset=AUDIO_OFFSET, eos=EOS, settings=bounds))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def variants(tiny: Step1) -> dict[str, Step1]:
    half = copy.deepcopy(tiny).to(torch.bfloat16)
    packed = copy.deepcopy(tiny)
    replace_linears(packed, HalfLinear.of)
    packed.join()
    return {
        "float32": tiny,
        "bfloat16": half,
        "float16": copy.deepcopy(tiny).to(torch.float16),
        "int8": replace_linears(copy.deepcopy(half), Int8Linear.of),  # type: ignore[dict-item]
        "float16 weights": packed,
    }


def prompt_of(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, AUDIO_OFFSET + 5120, length)


def ask(seed: int, length: int = 40, **settings: float) -> Generation:
    chosen = SamplingSettings(seed=seed, **{"min_groups": 4, "max_groups": 12, "attempts": 1, **settings})  # type: ignore[arg-type]
    return Generation(prompt_of(seed, length), chosen)


@pytest.mark.parametrize("variant", ["float32", "bfloat16", "float16", "int8", "float16 weights"])
def test_a_sequence_is_the_same_alone_in_a_batch_and_after_prefix_reuse(
    variants: dict[str, Step1], make_engine: MakeEngine, variant: str
) -> None:
    model = variants[variant]
    lengths = [20, 300, 256, 41, 513, 7, 255, 90, 33, 60]
    alone = []
    lonely = make_engine(model, slots=8, prefix_cache_tokens=0)
    for seed, length in enumerate(lengths):
        alone.append(lonely.submit(ask(seed, length)).result().mixed)
    crowded = make_engine(model, slots=8)
    for _ in range(2):  # the second round finds every prompt in the prefix cache
        together = [crowded.submit(ask(seed, length)) for seed, length in enumerate(lengths)]
        for expected, generation in zip(alone, together, strict=True):
            np.testing.assert_array_equal(generation.result().mixed, expected)
    assert crowded.prefix_hits >= sum(lengths)
    assert len({tuple(mixed) for mixed in alone}) == len(lengths)


def guided(seed: int, length: int, against: int | None = None, **settings: float) -> Generation:
    """Away from another prompt, of `against` tokens (its own prompt where that is None)."""
    generation = ask(seed, length, **{"guidance": 1.5, **settings})
    generation.against = generation.prompt if against is None else prompt_of(900 + seed, against)
    return generation


def test_a_guided_sequence_is_the_same_alone_in_a_batch_and_after_prefix_reuse(
    tiny: Step1, make_engine: MakeEngine
) -> None:
    sizes = [(20, 300), (300, 41), (256, 256), (33, 7)]
    lonely = make_engine(tiny, slots=2, prefix_cache_tokens=0)
    alone = [lonely.submit(guided(seed, *pair)).result().mixed for seed, pair in enumerate(sizes)]
    plain = [lonely.submit(ask(seed, length)).result().mixed for seed, (length, _) in enumerate(sizes)]
    crowded = make_engine(tiny, slots=5)
    for _ in range(2):
        together = [crowded.submit(guided(seed, *pair)) for seed, pair in enumerate(sizes)]
        beside = [crowded.submit(ask(seed, length)) for seed, (length, _) in enumerate(sizes)]
        for expected, generation in zip([*alone, *plain], [*together, *beside], strict=True):
            np.testing.assert_array_equal(generation.result().mixed, expected)
    assert all(tuple(one) != tuple(other) for one, other in zip(alone, plain, strict=True))


def test_guidance_away_from_the_prompt_itself_changes_nothing(tiny: Step1, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny)
    expected = engine.submit(ask(3, 50, temperature=0.0)).result().mixed
    np.testing.assert_array_equal(engine.submit(guided(3, 50, temperature=0.0)).result().mixed, expected)


def test_a_guided_sequence_takes_two_slots_and_gives_both_back(tiny: Step1, make_engine: MakeEngine) -> None:
    with pytest.raises(UserError, match="two slots"):
        make_engine(tiny, slots=1).submit(guided(0, 20))
    engine = make_engine(tiny, slots=3, stream_groups=1)
    endless = guided(1, 20, 30, min_groups=90, max_groups=90)
    endless.streams = True
    pieces = engine.submit(endless).pieces()
    next(pieces)
    waiting = engine.submit(guided(2, 20, 30))
    assert engine.load == (1, 1), "one slot is left, which is not enough"
    pieces.close()
    assert waiting.result().mixed.size
    assert all(engine.submit(guided(seed, 20, 30)).result().mixed.size for seed in range(4))
    collapsed = engine.submit(guided(5, 20, 30, min_groups=12, max_groups=12, attempts=2)).result()
    assert (collapsed.collapse, collapsed.attempts) == ("no_end", 2)
    with pytest.raises(UserError, match="vocabulary"):
        engine.submit(Generation(prompt_of(0, 5), SamplingSettings(), against=np.array([-1])))


def test_neighbours_that_come_late_or_are_cancelled_change_nothing(tiny: Step1, make_engine: MakeEngine) -> None:
    expected = make_engine(tiny, prefix_cache_tokens=0).submit(ask(0, 270, **NEVER_END)).result().mixed
    engine = make_engine(tiny, slots=3, prefix_cache_tokens=0, stream_groups=1)
    watched = ask(0, 270, **NEVER_END)
    watched.streams = True
    neighbours = [engine.submit(ask(seed, 30 * seed, min_groups=90, max_groups=90)) for seed in range(1, 4)]
    pieces = []
    for number, piece in enumerate(engine.submit(watched).pieces()):
        pieces.append(piece)
        if number % 4 == 2:
            neighbours.pop().cancel()
            neighbours.insert(0, engine.submit(ask(20 + number, 10 + number, min_groups=90, max_groups=90)))
        if number == 0:
            neighbours.pop().cancel()
    np.testing.assert_array_equal(np.concatenate(pieces[:-1]), expected)


def test_logits_are_bit_equal_in_batches_of_every_size(variants: dict[str, Step1]) -> None:
    for model in variants.values():
        choices = torch.arange(AUDIO_OFFSET - 1, AUDIO_OFFSET + 5120)
        found: dict[int, torch.Tensor] = {}
        for batch in (1, 2, 3, 5, 8):
            decoder = ExactDecoder(model, choices, slots=8, capacity=128)
            with torch.inference_mode():
                for slot in range(batch):
                    model.prefill(torch.from_numpy(prompt_of(slot, 20 + slot)), decoder.cache, slot)
                hidden = decoder.step([100 + slot for slot in range(batch)], list(range(batch)))
                for slot, row in enumerate(decoder.logits(hidden)):
                    assert torch.equal(found.setdefault(slot, row), row)


def test_the_row_multiple_falls_back_to_one_fixed_height(tiny: Step1) -> None:
    class Fickle(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * len(x)

    assert row_multiple(tiny, Fickle(), 12) == 24
    assert row_multiple(tiny, torch.nn.Identity(), 12) in (1, 2, 3, 4, 6, 8, 24)


def test_the_static_decoder_agrees_with_the_exact_one_in_any_company(tiny: Step1) -> None:
    choices = torch.arange(AUDIO_OFFSET - 1, AUDIO_OFFSET + 5120)
    exact = ExactDecoder(tiny, choices, slots=4, capacity=64)
    alone, crowded = (StaticDecoder(tiny, choices, slots=4, capacity=64) for _ in range(2))
    with torch.inference_mode():
        for decoder, slots in ((exact, (2,)), (alone, (2,)), (crowded, (0, 2, 3))):
            for slot in slots:
                tiny.prefill(torch.from_numpy(prompt_of(slot, 30)), decoder.cache, slot)
        for token in (70, 80, 90):
            expected = exact.logits(exact.step([token], [2]))[0]
            single = alone.logits(alone.step([token], [2]))[0]
            shared = crowded.logits(crowded.step([5, token, 6], [0, 2, 3]))[1]
            torch.testing.assert_close(single, expected, atol=1e-4, rtol=1e-4)
            assert torch.equal(single, shared)


def test_the_engine_runs_on_the_static_decoder(
    tiny: Step1, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make_engine(tiny).submit(ask(3)).result().mixed
    monkeypatch.setattr(engine_module, "ExactDecoder", StaticDecoder)
    static = make_engine(tiny)
    results = [static.submit(ask(seed)) for seed in (3, 4, 5)]
    np.testing.assert_array_equal(results[0].result().mixed, expected)


def test_more_requests_than_slots_all_finish_with_whole_groups(tiny: Step1, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny, slots=2)
    for generation in [engine.submit(ask(seed, 10 + seed)) for seed in range(9)]:
        split(generation.result().mixed)
    assert engine.load == (0, 0)


def test_prompts_that_begin_alike_share_their_blocks(tiny: Step1, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny)
    begin = prompt_of(1, 512)
    for tail in (b"", b"ab", b"cde"):
        prompt = np.concatenate([begin, np.frombuffer(tail, dtype=np.uint8).astype(np.int64)])
        engine.submit(Generation(prompt, SamplingSettings(max_groups=2))).result()
    assert engine.prefix_hits == 2 * 512


def test_decode_steps_sequences_and_prompt_tokens_are_counted(tiny: Step1, make_engine: MakeEngine) -> None:
    tallies = ((PASSES, "llm"), (ROWS, "llm"), (HITS, "prompt tokens"), (MISSES, "prompt tokens"))
    before = [counts(tally).get(name, 0) for tally, name in tallies]
    engine = make_engine(tiny)
    for generation in [engine.submit(ask(1, 30, **NEVER_END)) for _ in range(2)]:
        generation.result()
    passes, rows, hits, misses = (
        counts(tally)[name] - early for (tally, name), early in zip(tallies, before, strict=True)
    )
    assert rows == 2 * 60  # the first token comes with the prompt, the last step draws the end
    assert 60 <= passes <= 120
    assert (hits, misses) == (30, 30)


def test_the_prefix_cache_stays_within_its_bound(tiny: Step1, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny, prefix_cache_tokens=700)
    for seed in range(5):
        engine.submit(ask(seed, 300, max_groups=4)).result()
        assert engine._prefixes.tokens <= 700
    before = engine.prefix_hits
    engine.submit(ask(0, 300, max_groups=4)).result()
    assert engine.prefix_hits == before
    engine.submit(ask(4, 300, max_groups=4)).result()
    assert engine.prefix_hits == before + 300


def test_a_stream_hands_out_groups_that_add_up_to_the_whole(tiny: Step1, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny, stream_groups=3)
    whole = engine.submit(ask(2, **NEVER_END)).result().mixed
    streamed = ask(2, **NEVER_END)
    streamed.streams = True
    *pieces, outcome = engine.submit(streamed).pieces()
    assert [len(piece) for piece in pieces] == [15, 15, 15, 15]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert isinstance(outcome, Outcome)
    assert (outcome.attempts, outcome.collapse) == (1, "no_end")


def test_closing_a_stream_frees_the_slot(tiny: Step1, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny, slots=1, stream_groups=1)
    endless = Generation(prompt_of(0, 10), SamplingSettings(min_groups=190, max_groups=190, attempts=1), streams=True)
    pieces = engine.submit(endless).pieces()
    next(pieces)
    pieces.close()
    assert len(engine.submit(ask(1)).result().mixed) >= 20


def test_cancelled_and_late_sequences_stop_running_or_waiting(tiny: Step1, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny, slots=1)
    flag = threading.Event()
    running = ask(0, min_groups=190, max_groups=190, attempts=1)
    running.cancelled = flag.is_set
    waiting = ask(1)
    waiting.deadline = time.monotonic() + 0.01
    engine.submit(running)
    engine.submit(waiting)
    with pytest.raises(DeadlineExceeded):
        waiting.result()
    flag.set()
    with pytest.raises(RequestCancelled):
        running.result()


def test_the_queue_is_bounded_and_takes_higher_priority_first(tiny: Step1, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny, slots=1, queue_limit=2)
    blocker = engine.submit(ask(0, min_groups=190, max_groups=190, attempts=1))
    while engine.load != (1, 0):
        time.sleep(0.001)
    low = engine.submit(ask(1))
    high = ask(2)
    high.priority = 5
    engine.submit(high)
    with pytest.raises(InferenceUnavailable, match="2 generations wait"):
        engine.submit(ask(3))
    blocker.cancel()
    high.result()
    assert low._pieces.empty()
    low.result()


def test_a_collapsed_sequence_is_drawn_anew_and_then_reported(tiny: Step1, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny)
    first = engine.submit(ask(5, **NEVER_END)).result()
    outcome = engine.submit(ask(5, **{**NEVER_END, "attempts": 3})).result()
    assert (outcome.attempts, outcome.collapse) == (3, "no_end")
    assert not np.array_equal(outcome.mixed, first.mixed)


def test_reaching_the_limit_is_an_end_where_told(tiny: Step1, make_engine: MakeEngine) -> None:
    outcome = make_engine(tiny).submit(ask(1, **{**NEVER_END, "attempts": 3, "ends_full": 1})).result()
    assert (len(outcome.mixed), outcome.attempts, outcome.collapse) == (60, 1, None)


def test_a_loop_ends_an_attempt_before_its_limit(tiny: Step1, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny)
    stuck = SamplingSettings(temperature=0.0, repetition_window=0, min_groups=150, max_groups=150, attempts=1)
    flat = copy.deepcopy(tiny)
    torch.nn.init.zeros_(flat.model.norm.weight)
    outcome = make_engine(flat).submit(Generation(prompt_of(0, 20), stuck)).result()
    assert outcome.collapse == "loop"
    assert len(outcome.mixed) < 60 * 5
    assert engine.load == (0, 0)


def test_prompts_that_cannot_work_are_refused(tiny: Step1, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny, context=100)
    with pytest.raises(UserError, match="leaves no room"):
        engine.submit(ask(0, 99))
    for prompt in (np.array([], dtype=np.int64), np.array([10**6])):
        with pytest.raises(UserError, match="list of ids"):
            engine.submit(Generation(prompt, SamplingSettings()))
    assert len(engine.submit(ask(0, 60, min_groups=1, max_groups=500, attempts=1)).result().mixed) <= 35


def test_a_failing_step_fails_its_sequences_and_the_engine_goes_on(
    tiny: Step1, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny)
    with monkeypatch.context() as broken:
        broken.setattr(engine._decoder, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.submit(ask(0)).result()
    assert len(engine.submit(ask(0)).result().mixed)


def test_closing_fails_what_is_unfinished(tiny: Step1, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny, slots=1)
    unfinished = [engine.submit(ask(seed, min_groups=190, max_groups=190, attempts=1)) for seed in range(2)]
    engine.close()
    for generation in unfinished:
        with pytest.raises(InferenceUnavailable):
            generation.result()
    with pytest.raises(InferenceUnavailable):
        engine.submit(ask(0))


def test_the_engine_gives_what_prefill_and_decode_by_hand_give(tiny: Step1, make_engine: MakeEngine) -> None:
    generation = ask(11, 50)
    sampler = Sampler(generation.settings)
    cache = tiny.new_cache(slots=1, capacity=200)
    hidden = tiny.prefill(torch.from_numpy(generation.prompt), cache, 0)
    order = [*range(AUDIO_OFFSET, AUDIO_OFFSET + 5120), EOS]
    while sampler.choose(tiny.lm_head(hidden)[order].detach().numpy()) != END:
        hidden = tiny.decode(torch.tensor([AUDIO_OFFSET + sampler.tokens[-1]]), cache, [0])[0]
    np.testing.assert_array_equal(make_engine(tiny).submit(generation).result().mixed, sampler.tokens)


def test_a_small_model_on_a_cpu_works_on_one_thread_and_leaves_the_others_theirs(
    tiny: Step1, make_engine: MakeEngine
) -> None:
    seen: list[int] = []
    with threads(2):
        engine = make_engine(tiny)
        decode = engine._decoder.step

        def watched(tokens: Sequence[int], slots: Sequence[int]) -> Tensor:
            seen.append(torch.get_num_threads())
            return decode(tokens, slots)

        engine._decoder.step = watched  # type: ignore[method-assign]
        engine.submit(ask(1)).result()
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
