"""Loudness, resampling and trimming: against the official front end and against what they promise for any input."""

import math
from pathlib import Path

import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from shared.audio import signal
from shared.audio.signal import (
    TrimSpan,
    cut,
    find_speech,
    limit_peak,
    normalize_peak,
    resample,
    through_pcm16,
    trim_silence,
)

DATA = Path(__file__).parents[2] / "data"
CLIPS = ("en_happy_prompt", "zero_shot_en_prompt", "whisper_prompt")


def clip(name: str) -> tuple[torch.Tensor, int]:
    samples, rate = soundfile.read(DATA / "audio" / f"{name}.wav", dtype="float32", always_2d=True)
    return limit_peak(torch.from_numpy(samples).mean(1)), rate


@pytest.mark.parametrize("name", CLIPS)
def test_the_token_branch_is_trimmed_as_officially(name):
    samples, rate = clip(name)
    trimmed = trim_silence(normalize_peak(resample(samples, rate, 16000, filter_dtype=torch.float64)))
    golden = load_file(DATA / "golden" / "frontend_small" / f"{name}.safetensors")["trimmed_16k"]
    assert trimmed.shape == golden.shape
    assert torch.allclose(trimmed, golden, atol=1e-5)


def test_sixteen_bit_storage_rounds_as_officially():
    golden = load_file(DATA / "golden" / "frontend_small" / "en_happy_prompt.safetensors")["trimmed_16k"]
    stored = load_file(DATA / "golden" / "linguistic_small" / "io.safetensors")["en_happy_prompt.audio_16k"]
    assert torch.equal(through_pcm16(golden), stored)


def test_only_loud_recordings_are_scaled_down():
    quiet = torch.tensor([0.1, -0.5])
    assert limit_peak(quiet) is quiet
    assert limit_peak(torch.tensor([0.3, -1.2])).tolist() == pytest.approx([0.15, -0.6])
    assert limit_peak(torch.zeros(0)).numel() == 0


def test_the_gain_of_near_silence_is_bounded():
    assert normalize_peak(torch.tensor([1e-4])).item() == pytest.approx(1e-4 / 0.01 * 0.999)


@given(st.integers(1, 4000), st.sampled_from([8000, 11025, 22050, 24000, 44100, 48000, 96000]))
def test_resampling_keeps_the_duration(length, rate):
    assert len(resample(torch.randn(length), rate, 16000)) == math.ceil(length * 16000 / rate)


@pytest.mark.parametrize("rates", [(48000, 16000), (16000, 24000), (44100, 24000)])
def test_a_tone_below_both_limits_survives_resampling(rates):
    source, target = rates
    tone = torch.sin(2 * math.pi * 1000 * torch.arange(source, dtype=torch.float64) / source).float()
    expected = torch.sin(2 * math.pi * 1000 * torch.arange(target, dtype=torch.float64) / target).float()
    assert (resample(tone, source, target) - expected)[200:-200].abs().max() < 2e-3


def test_a_tone_above_the_new_limit_is_removed():
    tone = torch.sin(2 * math.pi * 11000 * torch.arange(48000) / 48000)
    assert resample(tone, 48000, 16000)[200:-200].abs().max() < 1e-2


@pytest.mark.parametrize("rates", [(441, 160), (2, 3), (3, 1)])
def test_the_direct_evaluation_of_odd_ratios_equals_the_stored_filter(rates):
    source, target = rates
    samples = torch.randn(2, 3000)
    stored = resample(samples, source, target, filter_dtype=torch.float64)
    direct = signal._resample_directly(samples, source, target, stored.shape[-1], block=257)
    assert torch.allclose(stored, direct, atol=2e-4)  # the stored filter rounds its phases to float32


def test_a_ratio_without_common_divisor_costs_no_huge_filter():
    out = resample(torch.sin(torch.arange(47999) / 30), 47999, 16000)
    assert len(out) == 16000
    assert out.isfinite().all()


def test_a_batch_is_resampled_like_its_rows():
    rows = torch.randn(3, 500)
    together = resample(rows, 44100, 16000)
    assert torch.allclose(together[1], resample(rows[1], 44100, 16000), atol=1e-6)


def test_impossible_rates_are_refused():
    with pytest.raises(ValueError, match="positive"):
        resample(torch.zeros(5), 0, 16000)


@given(st.integers(0, 20000), st.integers(1, 20000), st.integers(0, 20000))
def test_trimming_keeps_all_speech_and_lands_on_the_grid(before, speech, after):
    samples = torch.cat([torch.zeros(before), torch.full((speech,), 0.5), torch.zeros(after)])
    trimmed = trim_silence(samples)
    assert (len(trimmed) - 4320) % 240 == 0
    assert int((trimmed == 0.5).sum()) == speech


def test_speech_at_the_very_start_gets_silence_in_front():
    samples = torch.full((16000,), 0.5)
    span = find_speech(samples, 16000)
    assert span.start_s == pytest.approx(-0.05)
    assert not cut(samples, 16000, span)[:800].any()


def test_a_span_is_cut_at_any_rate_and_padded_where_it_reaches_out():
    samples = torch.arange(1.0, 101.0)
    assert cut(samples, 100, TrimSpan(-0.02, 0.05)).tolist() == [0, 0, 1, 2, 3]
    assert cut(samples, 100, TrimSpan(0.98, 0.04)).tolist() == [99, 100, 0, 0]
    assert cut(samples, 100, TrimSpan(5.0, 0.02)).tolist() == [0, 0]
    assert cut(samples, 100, TrimSpan(-5.0, 0.02)).tolist() == [0, 0]
