"""Features against the official front end's, and batches against their rows."""

from pathlib import Path

import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

from shared.audio import features
from shared.audio.features import linguistic_features, linguistic_frames, prompt_mel, speaker_fbank, whisper_log_mel
from shared.audio.signal import limit_peak, resample

DATA = Path(__file__).parents[2] / "data"
CLIPS = ("en_happy_prompt", "zero_shot_en_prompt", "whisper_prompt")
TOLERANCE = 1e-2  # log energies


def clip(name: str, rate: int) -> torch.Tensor:
    samples, own = soundfile.read(DATA / "audio" / f"{name}.wav", dtype="float32", always_2d=True)
    return resample(limit_peak(torch.from_numpy(samples).mean(1)), own, rate)


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(DATA / "golden" / "frontend_small" / f"{name}.safetensors")


@pytest.mark.parametrize("name", CLIPS)
def test_the_prompt_mel_is_the_official_one(name):
    assert torch.allclose(prompt_mel(clip(name, 24000)), golden(name)["prompt_mel"][0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CLIPS)
def test_the_speaker_features_are_the_official_ones(name):
    assert torch.allclose(speaker_fbank(clip(name, 16000)), golden(name)["speaker_fbank"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CLIPS)
def test_the_whisper_mel_is_the_official_one(name):
    expected = golden(name)
    assert torch.allclose(whisper_log_mel(expected["trimmed_16k"]), expected["whisper_log_mel"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CLIPS[:2])
def test_the_linguistic_features_are_the_official_ones(name):
    io = load_file(DATA / "golden" / "linguistic_small" / "io.safetensors")
    rows = (DATA / "golden" / "linguistic_small" / "am.mvn").read_text().split("<LearnRateCoef>")[1:]
    cmvn = torch.tensor([[float(x) for x in row.split("[")[1].split("]")[0].split()] for row in rows])
    found = linguistic_features(io[f"{name}.audio_16k"], cmvn=cmvn)
    assert torch.allclose(found, io[f"{name}.features"][0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("feature", [prompt_mel, speaker_fbank, whisper_log_mel, linguistic_features])
def test_a_padded_batch_gives_each_row_its_own_features(feature):
    whole = clip(CLIPS[0], 24000) * 0.5
    rows = [whole[:n] for n in (24000, 9001, 4321, 1500)]
    lengths = torch.tensor([len(row) for row in rows])
    together = feature(pad_sequence(rows, batch_first=True, padding_value=0.7), lengths)
    for row, single in zip(together, map(feature, rows), strict=True):
        row, single = (row.T, single.T) if feature is whisper_log_mel else (row, single)
        assert torch.allclose(row[: len(single)], single, atol=2e-3)
        assert not row[len(single) :].any()


def frames_of_the_chunk_loop(samples: int) -> int:
    """The published loop, step by step: 240 ms in, what fits into 25 ms windows out, stacked seven every six."""
    waiting, held, out = 0, None, 0
    starts = list(range(0, samples, 3840))
    for start in starts:
        last = start == starts[-1] and start + 3840 > samples
        waiting += min(3840, samples - start)
        new = (waiting - 400) // 160 + 1 if waiting >= 400 else 0
        waiting -= new * 160
        if new == 0 or (held if held is not None else 3) + new < 7:
            return out
        held = (3 if held is None else held) + new
        stacks = 0
        while stacks < -(-(held - 3) // 6) and (last or held - 6 * stacks >= 7):
            stacks += 1
        out, held = out + stacks, held - 6 * stacks
    return out


@given(st.integers(0, 40000))
def test_the_frame_count_is_that_of_the_published_chunk_loop(samples):
    assert int(linguistic_frames(torch.tensor(samples))) == frames_of_the_chunk_loop(samples)
    assert len(linguistic_features(torch.zeros(samples))) == frames_of_the_chunk_loop(samples)


@pytest.mark.parametrize("feature", [prompt_mel, whisper_log_mel])
def test_too_few_samples_to_mirror_are_refused(feature):
    with pytest.raises(ValueError, match="too few"):
        feature(torch.zeros(150))


def test_too_few_samples_for_a_frame_give_none():
    assert speaker_fbank(torch.zeros(399)).shape == (0, 80)
    assert linguistic_features(torch.zeros(2, 399)).shape == (2, 0, 560)


def test_silence_gives_finite_features():
    for feature in (prompt_mel, speaker_fbank, whisper_log_mel, linguistic_features):
        assert feature(torch.zeros(5000)).isfinite().all()


def test_filters_cover_their_band_and_nothing_beyond():
    kaldi, slaney = features._kaldi_filters(80), features._slaney(24000, 1920, 80, 0.0, 8000.0)
    assert kaldi.shape == (80, 257)
    assert not kaldi[:, 256].any()
    assert slaney.shape == (80, 961)
    assert not slaney[:, 641:].any()
    assert slaney.sum(1).min() > 0
