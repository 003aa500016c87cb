"""Sampling obeys the grammar, the bounds and the repetition rule, and draws by counter; collapses are found."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.llm.sampling import (
    CHOICES,
    END,
    Sampler,
    SamplingSettings,
    audible_share,
    find_loop,
    length_bounds,
    outside_pauses,
    speech_units,
)
from shared.codes import GROUP, split
from shared.errors import PermanentError, UserError
from shared.schemas.edit import Edit


def logits_of(seed: int, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, CHOICES).astype(np.float32)


def run(sampler: Sampler, seed: int = 0, limit: int = 400) -> list[int]:
    for step in range(limit):
        if sampler.choose(logits_of(seed * 1000 + step)) == END:
            break
    return sampler.tokens


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**62),
    low=st.integers(1, 6),
    extra=st.integers(0, 6),
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.5]),
    top_p=st.floats(0.05, 1.0),
    top_k=st.sampled_from([0, 1, 5, 10000]),
)
def test_every_sequence_is_whole_groups_within_its_bounds(
    seed: int, low: int, extra: int, temperature: float, top_p: float, top_k: int
) -> None:
    chosen = SamplingSettings(seed=seed, min_groups=low, max_groups=low + extra, temperature=temperature, top_p=top_p,
                              top_k=top_k)  # fmt: skip
    tokens = run(Sampler(chosen), seed % 97)
    linguistic, semantic = split(np.array(tokens))
    assert low * GROUP <= len(tokens) <= (low + extra) * GROUP
    assert len(linguistic) * 3 == len(semantic) * 2


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**62), cut=st.integers(0, 20))
def test_a_draw_depends_on_seed_attempt_and_place_alone(seed: int, cut: int) -> None:
    chosen = SamplingSettings(seed=seed, min_groups=8, max_groups=8)
    whole = Sampler(chosen)
    run(whole, 1)
    resumed = Sampler(chosen)
    resumed.tokens = whole.tokens[:cut]
    for step in range(cut, 40):
        resumed.choose(logits_of(1000 + step))
    assert resumed.tokens == whole.tokens
    assert run(Sampler(chosen, attempt=1), 1) != whole.tokens


def test_the_repetition_rule_forbids_the_newest_token_within_its_codebook() -> None:
    logits = np.full(CHOICES, -9.0, dtype=np.float32)
    logits[7] = logits[1030] = 50.0
    assert Sampler(SamplingSettings(repetition_window=0, temperature=0)).choose(logits) == 7
    sampler = Sampler(SamplingSettings(temperature=0.0, repetition_window=10, repetition_ratio=0.1))
    for _ in range(5):
        sampler.choose(logits)
    # once is 1 of 10 and not above the ratio, twice is: the third in a row is forbidden
    assert sampler.tokens == [7, 7, 1030, 1030, 1024]


def test_greedy_takes_the_largest_and_top_k_one_does_the_same() -> None:
    logits = logits_of(5)
    greedy = Sampler(SamplingSettings(temperature=0.0)).choose(logits)
    assert greedy == int(logits[:1024].argmax())
    assert Sampler(SamplingSettings(top_k=1, seed=9)).choose(logits) == greedy


def test_frequencies_follow_the_softmax_at_the_temperature() -> None:
    logits = np.full(CHOICES, -np.inf, dtype=np.float32)
    logits[:3] = [0.0, 1.0, 2.0]
    drawn = [Sampler(SamplingSettings(seed=s, temperature=2.0)).choose(logits) for s in range(4000)]
    expected = np.exp(np.array([0.0, 0.5, 1.0]))
    assert np.bincount(drawn, minlength=3) / 4000 == pytest.approx(expected / expected.sum(), abs=0.03)


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    logits = np.full(CHOICES, -np.inf, dtype=np.float32)
    logits[:4] = np.log([0.5, 0.3, 0.15, 0.05])
    drawn = {Sampler(SamplingSettings(seed=s, temperature=1.0, top_p=0.7)).choose(logits) for s in range(300)}
    assert drawn == {0, 1}


def test_logits_without_a_number_are_an_error_and_not_a_token() -> None:
    with pytest.raises(PermanentError, match="no usable number at token 0"):
        Sampler(SamplingSettings()).choose(np.full(CHOICES, np.nan, dtype=np.float32))


def test_a_guided_draw_prefers_what_the_other_prompt_makes_less_likely_among_likely_tokens() -> None:
    logits, against = (np.full(CHOICES, -20.0, np.float32) for _ in range(2))
    logits[[3, 4, 5]] = 2.0, 1.5, -6.0
    against[[3, 4, 5]] = 2.0, 0.0, -20.0

    def pick(guidance: float, other: np.ndarray | None = against) -> int:
        return Sampler(SamplingSettings(temperature=0.0, guidance=guidance)).choose(logits, other)

    assert pick(1.0, None) == pick(0.0) == 3
    assert pick(1.0) == 4, "1.5 nats likelier than after the other prompt"
    assert pick(10.0) == 4, "what is 8 nats below the likeliest is out, however much the other prompt dislikes it"
    with pytest.raises(PermanentError):
        pick(1.0, np.full(CHOICES, np.nan, np.float32))


@pytest.mark.parametrize(
    "wrong", [{"temperature": 3.0}, {"top_p": 0.0}, {"min_groups": 5, "max_groups": 4}, {"seed": -1}, {"attempts": 0}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="Sampling:"):
        SamplingSettings(**wrong)  # type: ignore[arg-type]


def test_speech_units_count_signs_letters_and_no_tags() -> None:
    assert speech_units("你好[Laughter]") == 2
    assert speech_units("hello there [Sigh]") == pytest.approx(10 / 3)


@settings(max_examples=60, deadline=None)
@given(
    edit=st.sampled_from([
        Edit(type="emotion", detail="sad"), Edit(type="vad"), Edit(type="denoise"), Edit(type="speed", detail="faster"),
        Edit(type="speed", detail="more slower"), Edit(type="clone", target_text="Say this."),
        Edit(type="paralinguistic", target_text="Well [Sigh] yes"), Edit(type="style", detail="remove"),
    ]),
    source=st.integers(0, 2000),
    longest=st.one_of(st.none(), st.floats(0.1, 600)),
)  # fmt: skip
def test_bounds_are_ordered_and_obey_the_cap(edit: Edit, source: int, longest: float | None) -> None:
    low, high = length_bounds(edit, source, "What was said.", max_duration_s=longest)
    assert 1 <= low <= high
    if longest is not None:
        assert high <= max(1, longest / 0.12)


def test_bounds_follow_the_edit() -> None:
    faster, slower = (length_bounds(Edit(type="speed", detail=d), 100, "x") for d in ("more faster", "more slower"))
    assert faster[1] < slower[1]
    assert faster[0] < slower[0]
    short = length_bounds(Edit(type="clone", target_text="Yes."), 100, "A sentence of a good length, spoken calmly.")
    long = length_bounds(Edit(type="clone", target_text="Yes. " * 40), 100, "A sentence of a good length.")
    assert short[1] < long[1]


def test_no_result_is_shorter_than_its_text_said_in_haste() -> None:
    two = "I have finished it and feel relieved. Everything seems easier now, and more colourful."
    first_alone = speech_units("I have finished it and feel relieved.") * 0.26 / 0.12
    spoken = round(speech_units(two) * 0.26 / 0.12)  # groups, at the pace of most readings
    sad, faster, most = (
        Edit(type="emotion", detail="sad"),
        *(Edit(type="speed", detail=d) for d in ("faster", "more faster")),
    )
    low = length_bounds(sad, spoken, two)[0]
    assert first_alone < low <= 0.7 * spoken
    assert low > length_bounds(faster, spoken, two)[0] > length_bounds(most, spoken, two)[0]
    assert length_bounds(sad, 3 * spoken, two)[0] >= low, "pauses in the source do not make a text shorter"
    assert length_bounds(sad, spoken // 2, two)[0] < 0.75 * low, "who speaks fast may be followed"
    assert length_bounds(sad, spoken, None)[0] == int(0.4 * spoken), "nothing is known of the words"
    clone = Edit(type="clone", target_text=two)
    assert length_bounds(clone, spoken, two)[0] == low


def test_vad_keeps_what_can_be_heard_and_no_more() -> None:
    level = np.full((100, 80), -11.0, np.float32)  # ln of amplitude: a recording of which 60 frames are speech
    level[10:40] = level[70:100] = -2.0
    assert audible_share(level) == pytest.approx(0.6)
    assert audible_share(np.maximum(level, -4.5)) == pytest.approx(0.6), "in noise as well"
    assert audible_share(np.zeros((0, 80), np.float32)) == 0.0
    assert length_bounds(Edit(type="vad"), 100, audible=0.6)[0] == 60
    assert length_bounds(Edit(type="vad"), 100)[0] == 10
    assert length_bounds(Edit(type="denoise"), 100, audible=0.9) == length_bounds(Edit(type="denoise"), 100)


def test_groups_wholly_inside_a_pause_are_left_out() -> None:
    level = np.full((120, 80), -11.0, np.float32)  # 20 groups of six frames
    level[:33] = level[57:84] = level[95:120] = -2.0  # 24 silent frames, then 11
    assert np.flatnonzero(~outside_pauses(level, 20)).tolist() == [6, 7, 8], "the parts at its ends stay"
    level[33:57] = -2.0
    level[32:57] = -11.0
    assert np.flatnonzero(~outside_pauses(level, 20)).tolist() == [5, 6, 7, 8], "two frames of a sound's end go too"
    level[32] = -2.0
    level[33:57] = -6.7
    assert not outside_pauses(level, 20)[6:9].any(), "40 dB below the loud frames is silence"
    level[33:57] = -6.5
    assert outside_pauses(level, 20).all()
    assert outside_pauses(np.full((12, 80), -2.0, np.float32), 2).tolist() == [True, True], "nothing stands out"
    assert outside_pauses(np.zeros((0, 80), np.float32), 0).tolist() == []


def groups_of(semantic: np.ndarray) -> np.ndarray:
    linguistic = np.random.default_rng(1).integers(0, 1024, (len(semantic), 2))
    return np.concatenate([linguistic, semantic + 1024], axis=1).reshape(-1)


@pytest.mark.parametrize("period", [1, 3, 25])
def test_a_loop_is_found_where_it_starts(period: int) -> None:
    generator = np.random.default_rng(0)
    speech = generator.integers(0, 4096, (60, 3))
    loop = np.tile(generator.integers(0, 4096, (period, 3)), (150 // period, 1))
    start = find_loop(groups_of(np.concatenate([speech, loop])))
    assert start is not None
    assert start >= 60


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), pause=st.integers(0, 30))
def test_speech_with_a_pause_is_no_loop(seed: int, pause: int) -> None:
    generator = np.random.default_rng(seed)
    speech = generator.integers(0, 4096, (90, 3))
    silence = np.full((pause, 3), 17)
    assert find_loop(groups_of(np.concatenate([speech, silence]))) is None
    assert find_loop(groups_of(np.concatenate([speech, silence, speech[:5]]))) is None
