"""A stream through the spectral vocoder against one pass, with as much look-ahead as decides and with what it takes."""

from pathlib import Path

import pytest
import soxr
import torch
from torch import Tensor

from shared.audio.features import prompt_mel
from shared.audio.io import read_audio
from shared.checkpoints.decoder import load_vocoder
from shared.checkpoints.layout import Checkpoint
from shared.models.spectral import SpectralConfig, SpectralRows, SpectralVocoder
from shared.models.spectral_stream import SpectralStream, exact_lookahead
from shared.models.vocoder_stream import open_stream

torch.set_num_threads(1)  # these models are too small to share out
RECORDING = Path(__file__).parents[2] / "data" / "audio" / "en_happy_prompt.wav"
HOP = 480


@pytest.fixture(scope="module")
def nano() -> SpectralVocoder:
    vocoder = load_vocoder(Checkpoint.resolve("nano"))
    assert isinstance(vocoder, SpectralRows)
    return vocoder.model


@pytest.fixture(scope="module")
def speech() -> Tensor:
    """The mel (80, 150) of three seconds of a recording that begins with silence."""
    sound = read_audio(RECORDING)
    at24 = torch.from_numpy(soxr.resample(sound.samples, sound.sample_rate_hz, 24_000)).float()
    return prompt_mel(torch.cat([torch.zeros(4 * HOP), at24]))[:150].T


@pytest.fixture(scope="module")
def small() -> SpectralVocoder:
    torch.manual_seed(0)
    model = SpectralVocoder(SpectralConfig(hidden=24, blocks=2, fine_blocks=1, f0_hidden=16, f0_blocks=1)).eval()
    assert model.f0_predictor.outlet.bias is not None
    torch.nn.init.normal_(model.f0_predictor.outlet.bias, std=2.0)
    return model


def one_pass(model: SpectralVocoder, mel: Tensor, seed: int = 7) -> Tensor:
    with torch.inference_mode():
        return model(mel[None], seed=seed)[0]  # type: ignore[no-any-return]


def in_chunks(stream: SpectralStream, mel: Tensor, sizes: list[int]) -> list[Tensor]:
    parts = mel.split([*sizes, mel.shape[1] - sum(sizes)], dim=1)
    return [stream.push(part, last=index == len(sizes)) for index, part in enumerate(parts)]


def below_signal_db(wanted: Tensor, found: Tensor) -> float:
    assert found.shape == wanted.shape
    return float(10 * torch.log10(wanted.var() / (wanted - found).var()))


@pytest.mark.parametrize("sizes", [[24, 30, 48], [1, 2, 3, 40, 1, 1], []])
def test_with_the_whole_look_ahead_a_stream_is_one_pass(
    nano: SpectralVocoder, speech: Tensor, sizes: list[int]
) -> None:
    """What differs is rounding: 66 to 70 dB below the signal."""
    stream = SpectralStream(nano, seed=7, lookahead_frames=exact_lookahead(nano.config))
    assert below_signal_db(one_pass(nano, speech), torch.cat(in_chunks(stream, speech, sizes))) > 60


def test_with_its_own_look_ahead_a_stream_of_speech_lacks_little_to_one_pass(
    nano: SpectralVocoder, speech: Tensor
) -> None:
    """Measured with nano: 59 dB, and a mel within 0.001 on average."""
    found = torch.cat(in_chunks(SpectralStream(nano, seed=7), speech, [24, 30, 48]))
    wanted = one_pass(nano, speech)
    assert below_signal_db(wanted, found) > 40
    assert float((prompt_mel(found) - prompt_mel(wanted)).abs().mean()) < 0.005


def test_random_mels_and_a_batch_in_step_equal_one_pass_too(small: SpectralVocoder) -> None:
    mel = torch.randn(80, 120) - 4
    stream = SpectralStream(small, seed=7, lookahead_frames=exact_lookahead(small.config))
    assert below_signal_db(one_pass(small, mel), torch.cat(in_chunks(stream, mel, [30, 48]))) > 50


def test_sound_comes_up_to_twelve_frames_before_the_newest(small: SpectralVocoder) -> None:
    pieces = in_chunks(SpectralStream(small), torch.randn(80, 100) - 4, [11, 13, 30])
    assert [len(piece) // HOP for piece in pieces] == [0, 12, 30, 58]


def test_a_long_stream_keeps_no_more_than_a_short_one(small: SpectralVocoder) -> None:
    stream, sizes = SpectralStream(small), set()
    for _ in range(12):
        stream.push(torch.randn(80, 30) - 4)
        assert stream._state is not None
        sizes.add(tuple(part.shape[-1] for part in (stream._state.mel, stream._state.pulses, stream._state.sound)))
    assert len(sizes) <= 2  # the first chunk's, and all others'


def test_streams_side_by_side_do_not_meet(small: SpectralVocoder) -> None:
    mels = [torch.randn(80, 90) - 4 for _ in range(2)]
    alone = [torch.cat(in_chunks(SpectralStream(small, seed=seed), mel, [30, 30])) for seed, mel in enumerate(mels)]
    streams = [SpectralStream(small, seed=seed) for seed in range(2)]
    found: list[list[Tensor]] = [[], []]
    for turn in range(3):
        for which, stream in enumerate(streams):
            found[which].append(stream.push(mels[which][:, 30 * turn : 30 * turn + 30], last=turn == 2))
    assert all(torch.equal(torch.cat(parts), wanted) for parts, wanted in zip(found, alone, strict=True))


def test_a_stream_that_ends_without_a_frame_is_silent(small: SpectralVocoder) -> None:
    assert len(open_stream(SpectralRows(small), 0).push(torch.zeros(80, 0), last=True)) == 0
