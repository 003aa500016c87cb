"""Streams through a vocoder that starts its phase anew with every call."""

import torch

from shared.checkpoints.decoder import SpectralRows
from shared.models.spectral import SpectralConfig, SpectralVocoder
from shared.models.vocoder_stream import VocoderStream

torch.set_num_threads(1)  # these models are too small to share out


def test_a_spectral_stream_stays_near_one_pass() -> None:
    torch.manual_seed(0)
    config = SpectralConfig(hidden=16, blocks=1, fine_blocks=1, f0_hidden=16, f0_blocks=1)
    vocoder = SpectralRows(SpectralVocoder(config).eval())
    mel = torch.randn(80, 120) - 4
    wanted = vocoder(mel[None], None, [7])[0]
    stream = VocoderStream(vocoder, seed=7)
    found = torch.cat([stream.push(mel[:, :30]), stream.push(mel[:, 30:78]), stream.push(mel[:, 78:], last=True)])
    assert found.shape == wanted.shape
    assert 10 * torch.log10(wanted.var() / (wanted - found).var()) > 20


def test_a_stream_that_ends_without_a_frame_is_silent() -> None:
    assert len(VocoderStream(SpectralRows(SpectralVocoder(SpectralConfig()))).push(torch.zeros(80, 0), last=True)) == 0
