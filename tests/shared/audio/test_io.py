"""Recordings in and out, and everything that a hostile or broken file may try."""

import contextlib
import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.audio.io import Waveform, read_audio, write_audio
from shared.errors import UserError

BYTE = st.integers(0, 255)
AUDIO = Path(__file__).parents[2] / "data" / "audio"


def tone(seconds: float = 0.5, rate: int = 24000, channels: int = 1) -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * 220 * np.arange(int(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, axis=1)


def encoded(samples: np.ndarray, rate: int = 24000, fmt: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=fmt, subtype=subtype)
    return buffer.getvalue()


def code_of(source, **limits) -> str:
    with pytest.raises(UserError) as caught:
        read_audio(source, **limits)
    assert caught.value.hint
    return caught.value.code


@pytest.mark.parametrize(
    ("fmt", "subtype"),
    [("WAV", "PCM_U8"), ("WAV", "PCM_24"), ("WAV", "PCM_32"), ("WAV", "FLOAT"), ("WAV", "DOUBLE"), ("WAV", "ULAW"),
     ("WAVEX", "PCM_16"), ("RF64", "PCM_16"), ("AIFF", "PCM_16"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24"),
     ("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS")],
)  # fmt: skip
def test_every_format_and_depth_is_read(fmt, subtype):
    found = read_audio(encoded(tone(), fmt=fmt, subtype=subtype))
    assert found.sample_rate_hz == 24000
    assert found.samples.dtype == np.float32
    assert found.duration_s == pytest.approx(0.5, abs=0.06)
    assert np.abs(found.samples).max() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 48000, 96000, 192000])
def test_every_rate_is_read(rate):
    assert read_audio(encoded(tone(rate=rate), rate)).sample_rate_hz == rate


def test_seven_channels_are_mixed_by_their_mean():
    samples = tone(channels=7) * np.linspace(0, 1, 7)
    assert np.allclose(read_audio(encoded(samples)).samples, samples.mean(axis=1), atol=1e-4)


def test_path_bytes_and_stream_give_the_same_samples():
    path = AUDIO / "en_happy_prompt.wav"
    expected = read_audio(path).samples
    assert np.array_equal(read_audio(str(path)).samples, expected)
    assert np.array_equal(read_audio(path.read_bytes()).samples, expected)
    with path.open("rb") as stream:
        assert np.array_equal(read_audio(stream).samples, expected)


def test_a_file_that_claims_more_than_it_holds_gives_what_it_holds():
    wav = bytearray(encoded(tone()))
    wav[4:8] = wav[40:44] = struct.pack("<I", 0xFFFFFFFF)
    assert read_audio(bytes(wav)).duration_s == pytest.approx(0.5)


def test_a_huge_claimed_length_is_refused_before_decoding():
    flac = bytearray(encoded(tone(), fmt="FLAC"))
    flac[21] |= 0x0F
    flac[22:26] = b"\xff" * 4
    assert code_of(bytes(flac)) == "audio_too_long"


def test_a_header_without_sound_and_a_single_sample_are_refused():
    assert code_of(encoded(np.zeros((0, 1)))) in ("audio_empty", "audio_too_short")
    assert code_of(encoded(np.full((1, 1), 0.5))) == "audio_too_short"


def test_empty_missing_and_foreign_sources_are_refused(tmp_path):
    assert code_of(b"") == "audio_empty"
    assert code_of(tmp_path / "nothing.wav") == "audio_missing"
    assert code_of(tmp_path) == "audio_missing"
    assert code_of(b"%PDF-1.7 this is no recording" * 100) == "audio_not_readable"
    assert code_of(encoded(tone(), fmt="AU")) == "audio_not_readable"


def test_silence_is_refused_even_with_an_offset():
    assert code_of(encoded(np.zeros((12000, 1)))) == "audio_silent"
    assert code_of(encoded(np.full((12000, 2), 0.25))) == "audio_silent"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_floats_that_are_no_numbers_are_refused(bad):
    samples = tone()
    samples[777] = bad
    assert code_of(encoded(samples, subtype="FLOAT")) == "audio_not_finite"


def test_floats_beyond_float32_are_refused_without_a_warning():
    assert code_of(encoded(tone() * 1e300, subtype="DOUBLE")) == "audio_not_finite"


def test_limits_hold(tmp_path):
    path = tmp_path / "long.wav"
    path.write_bytes(encoded(tone(2.0)))
    assert code_of(path, max_duration_s=1.0) == "audio_too_long"
    assert code_of(path, max_bytes=1000) == "audio_too_large"
    assert code_of(path.read_bytes(), max_bytes=1000) == "audio_too_large"
    assert code_of(io.BytesIO(path.read_bytes()), max_bytes=1000) == "audio_too_large"
    assert code_of(encoded(tone(channels=20))) == "audio_unsupported"
    assert code_of(encoded(tone(rate=2000), 2000)) == "audio_unsupported"


COMMON = [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS")]


@pytest.mark.parametrize(("fmt", "subtype"), COMMON)
def test_a_file_cut_anywhere_is_read_or_refused(fmt, subtype):
    whole = encoded(tone(), fmt=fmt, subtype=subtype)
    for end in (1, 4, 12, 20, 36, 44, 60, 100, len(whole) // 2, len(whole) - 1):
        with contextlib.suppress(UserError):
            assert read_audio(whole[:end]).duration_s <= 0.51


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["WAV", "FLAC", "OGG"]), st.lists(st.tuples(st.integers(0, 4000), BYTE), max_size=8))
def test_a_damaged_file_never_raises_anything_but_a_user_error(fmt, damage):
    data = bytearray(encoded(tone(0.2), fmt=fmt))
    for position, value in damage:
        data[position % len(data)] = value
    with contextlib.suppress(UserError):
        assert np.isfinite(read_audio(bytes(data)).samples).all()


@given(st.binary(max_size=400))
def test_random_bytes_never_raise_anything_but_a_user_error(data):
    with pytest.raises(UserError):
        read_audio(b"RIFF" + data)


@pytest.mark.parametrize("fmt", ["wav", "flac", "mp3", "opus"])
def test_what_is_written_is_read_again(tmp_path, fmt):
    wave = Waveform(tone()[:, 0].astype(np.float32), 24000)
    target = tmp_path / f"out.{fmt}"
    assert write_audio(wave, target, fmt) is None
    found = read_audio(target)
    assert found.sample_rate_hz == 24000
    assert found.duration_s == pytest.approx(0.5, abs=0.06)
    as_bytes = write_audio(wave, None, fmt)
    assert as_bytes is not None
    assert read_audio(as_bytes).duration_s == found.duration_s
    assert os.listdir(tmp_path) == [target.name]


def test_loud_samples_are_clipped_instead_of_wrapping_round(tmp_path):
    data = write_audio(Waveform(np.tile(np.array([1.7, -1.7], np.float32), 4000), 24000), None, "wav")
    assert data is not None
    assert np.abs(read_audio(data).samples).min() > 0.99


def test_unknown_formats_and_impossible_rates_are_refused():
    wave = Waveform(tone()[:, 0].astype(np.float32), 44100)
    with pytest.raises(UserError, match="wma"):
        write_audio(wave, None, "wma")
    with pytest.raises(UserError, match="44100"):
        write_audio(wave, None, "opus")


def test_reading_and_writing_need_no_torch():
    code = "import sys, shared.audio.io, shared.artifacts, shared.codes; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
