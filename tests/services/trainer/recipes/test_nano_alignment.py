"""Where a spoken token comes from: times of characters, tokens of the source, and the attention that is shown to it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from services.trainer.recipes.nano import alignment, llm
from services.trainer.recipes.nano.run import Optimizer
from services.trainer.recipes.nano.source_filter import BINS, Speaker, move
from services.trainer.recipes.nano.teacher import MANNERS
from shared.models.step1 import Step1, Step1Config

ROW: dict[str, Any] = {
    "text": "Ab cd.", "phonemes": [43, 44, 16, 46, 47, 4], "frames": [2, 2, 2, 1, 3, 3, 1, 2], "duration_s": 1.6,
}  # fmt: skip
CONFIG = Step1Config(
    hidden_size=64, intermediate_size=64, num_attention_heads=8, num_attention_groups=2, num_hidden_layers=5,
    vocab_size=40 + 5120,
)  # fmt: skip


def test_characters_begin_where_their_words_do() -> None:
    assert alignment.boundaries(ROW)[-1] == pytest.approx(1.6)
    starts = alignment.char_starts(ROW)
    assert starts[0] == pytest.approx(0.2)
    assert starts[3] == pytest.approx(0.7)
    assert (np.diff(starts) >= 0).all()


def test_a_text_of_other_words_than_the_phonemes_is_spread_evenly() -> None:
    starts = alignment.char_starts(ROW | {"text": "one two three"})
    assert np.allclose(np.diff(starts), np.diff(starts)[0])


def test_token_times_follow_both_frame_rates() -> None:
    assert np.allclose(alignment.token_times(7), [0.03, 0.09, 0.02, 0.06, 0.10, 0.15, 0.21])


def test_the_same_moment_is_the_same_token() -> None:
    times = alignment.token_times(30)
    found = alignment.tokens_at(times, np.arange(30) % 5, 30)
    assert (found[:, 1] == np.arange(30)).all()
    assert found[0, 0] == -1
    assert found[29, 2] == -1


def test_a_slower_reading_is_found_at_half_the_time() -> None:
    slow = ROW | {"frames": [2 * f for f in ROW["frames"]], "duration_s": 3.2}
    times = alignment.source_times(np.array([0.4, 2.0]), slow, ROW)
    assert times is not None
    assert np.allclose(times, [0.2, 1.0])
    assert alignment.source_times(np.array([0.4]), slow, ROW | {"phonemes": [1]}) is None


def test_groups_in_pauses_are_left_out() -> None:
    # groups of 0.12 s; silence from 0.29 to 0.67 s (2.4 to 5.6 groups) and from 0.88 to 1.12 s (7.3 to 9.3)
    silences = alignment.put_in([(0.29, 0.38), (0.50, 0.24)])
    assert np.allclose(silences, [(0.29, 0.67), (0.88, 1.12)])
    assert np.flatnonzero(~alignment.groups_outside(silences, 11)).tolist() == [2, 3, 4, 5, 7, 8]
    assert alignment.groups_outside([], 3).all()
    assert alignment.speech_span(ROW) == pytest.approx((0.2, 1.4))


def test_what_was_put_in_has_no_place_in_what_was_before() -> None:
    times = alignment.times_without(np.array([0.1, 0.5, 0.9]), 0.4, 0.3)
    assert np.allclose(times, [0.1, -1.0, 0.6])
    assert (alignment.tokens_at(times, np.array([0, 1, 2]), 30)[1] == -1).all()


def test_a_text_is_found_where_it_stands_last() -> None:
    places = alignment.TextPlaces(["x", "a", "▁b", "c"])
    found = places([1, 2, 0, 9, 1, 2, 3], "a b")
    assert found is not None
    assert found.tolist() == [4, 5, 5]
    assert places([0, 0], "a b") is None


def test_an_end_competes_with_linguistic_codes_and_text_with_text() -> None:
    offset, eos = 40, 3
    ids = torch.tensor([offset + 5, offset + 1024 + 7, eos, eos, 12])
    before = torch.tensor([9, offset + 5, offset + 1030, 12, 9])
    found = llm.choices(ids, before, offset, eos)
    assert found["linguistic"].places.tolist() == [0, 2]
    assert found["linguistic"].rows[found["linguistic"].right].tolist() == [offset + 5, eos]
    assert found["semantic"].rows[found["semantic"].right].tolist() == [offset + 1024 + 7]
    assert found["text"].rows[found["text"].right].tolist() == [eos, 12]


def test_shown_heads_learn_to_look_where_they_are_shown() -> None:
    torch.manual_seed(0)
    model = Step1(CONFIG)
    model.initialise(seed=0)
    ids = torch.randint(0, 5000, (2, 24))
    text = torch.full((2, 24, 3), -1)
    text[:, 12:23, 1] = torch.arange(1, 12)
    batch = llm.Batch(ids, ids, torch.ones(2, 24, dtype=torch.bool), text, torch.full((2, 24, 3), -1))
    optimizer = Optimizer(model, 3e-3, outside=("embed", "lm_head"))
    shown = []
    for _ in range(60):
        losses = llm.loss_of(model, 40, batch, 1.0)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        shown.append(float(losses["shown"]))
    assert shown[-1] < 0.6 * shown[0]


def test_the_shown_attention_changes_no_number_of_the_model() -> None:
    model = Step1(CONFIG)
    model.initialise(seed=0)
    ids = torch.randint(0, 5000, (1, 16))
    nothing = torch.full((1, 16, 3), -1)
    shown = llm.Shown(model.whole_sequences(ids), model, nothing, nothing)
    assert torch.equal(model.hidden_states(ids, attend=shown), model.hidden_states(ids))


def test_the_optimizer_continues_where_it_stopped() -> None:
    def layer() -> torch.nn.Linear:
        torch.manual_seed(1)
        return torch.nn.Linear(8, 8)

    def step(module: torch.nn.Linear, optimizer: Optimizer) -> None:
        optimizer.zero_grad()
        module(torch.ones(2, 8)).square().mean().backward()
        optimizer.step()

    first = layer()
    whole = Optimizer(first, 0.01, outside=("head",))
    step(first, whole)
    second = layer()
    second.load_state_dict(first.state_dict())
    resumed = Optimizer(second, 0.01, outside=("head",))
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    step(first, whole)
    step(second, resumed)
    assert torch.equal(first.weight, second.weight)


def spectrum(frames: int = 40) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    names = ("lh", "theta", "ln", "lr", "phi")
    arrays = {name: rng.standard_normal((BINS, frames)).astype(np.float32) for name in names}
    f0 = np.full(frames, 200.0, np.float32) + np.linspace(-20, 20, frames, dtype=np.float32)
    f0[:5] = 0
    return arrays | {"f0": f0}


def test_a_speaker_moves_pitch_and_leaves_silence_unvoiced() -> None:
    before = spectrum()
    after = move(before, Speaker(f0=0.6), MANNERS["neutral"])
    assert (after["f0"][:5] == 0).all()
    assert np.median(after["f0"][5:]) == pytest.approx(0.6 * np.median(before["f0"][5:]), rel=0.02)
    assert np.allclose(after["lh"][:-1], before["lh"][:-1], atol=1e-5)


def test_a_cheap_whisper_has_no_pitch_and_keeps_the_envelope_as_noise() -> None:
    before = spectrum()
    after = move(before, Speaker(), MANNERS["style/whisper"])
    assert not after["f0"].any()
    assert after["ln"].mean() > before["ln"].mean()


def test_higher_formants_stretch_the_envelope() -> None:
    before = spectrum()
    before["lh"] = np.zeros((BINS, 40), np.float32)
    before["lh"][100] = 5.0
    after = move(before, Speaker(formant=1.1), MANNERS["neutral"])
    assert abs(int(after["lh"][:, 0].argmax()) - 110) <= 1
