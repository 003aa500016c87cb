"""The frame-rate vocoder: its excitation, its base filter, and that a row sounds the same alone and in a batch."""

from __future__ import annotations

import math

import pytest
import torch

from shared.audio.features import prompt_mel
from shared.models.spectral import SILENCE, SpectralConfig, SpectralVocoder, harmonic_excitation

SMALL = SpectralConfig(hidden=24, blocks=2, fine_blocks=1, f0_hidden=16, f0_blocks=1)


@pytest.fixture(scope="module")
def vocoder() -> SpectralVocoder:
    torch.manual_seed(0)
    model = SpectralVocoder(SMALL).eval()
    torch.nn.init.normal_(model.f0_predictor.outlet.bias, std=2.0)
    return model


def test_the_excitation_has_every_harmonic_of_f0_at_the_same_level_and_nothing_else() -> None:
    wave = harmonic_excitation(torch.full((1, 50), 200.0), 480, 24_000)[0]
    spectrum = torch.fft.rfft(wave.double()).abs()
    on, off = spectrum[200:11_900:200], spectrum[100:11_900:200]
    assert float(on.min() / on.max()) > 0.99
    assert float(off.max() / on.min()) < 1e-3


def test_the_excitation_is_silent_where_nothing_is_voiced_and_of_unit_power_elsewhere() -> None:
    f0 = torch.cat([torch.zeros(1, 20), torch.full((1, 20), 120.0)], 1)
    wave = harmonic_excitation(f0, 480, 24_000)[0]
    assert float(wave[: 19 * 480].abs().max()) == 0.0
    assert float(wave[21 * 480 :].std()) == pytest.approx(1.0, abs=0.05)


def test_the_excitation_keeps_its_pitch_through_ten_minutes() -> None:
    wave = harmonic_excitation(torch.full((1, 30_000), 100.0), 480, 24_000)[0]
    first, last = wave[24_000:48_000], wave[-48_000:-24_000]
    assert float((first - last).abs().max()) < 1e-2 * float(first.abs().max())


def test_a_row_sounds_the_same_alone_and_in_a_longer_batch(vocoder: SpectralVocoder) -> None:
    short, long = torch.randn(1, 80, 31) - 5, torch.randn(1, 80, 90) - 5
    batch = torch.full((2, 80, 90), 3.0)  # what lies beyond a length must not matter
    batch[0, :, :31], batch[1] = short[0], long[0]
    with torch.inference_mode():
        together = vocoder(batch, torch.tensor([31, 90]))
        alone = vocoder(short)
    assert together.shape == (2, 90 * 480)
    torch.testing.assert_close(together[:1, : 31 * 480], alone, atol=1e-3, rtol=0)  # of full scale, as for golden audio
    assert float(together[0, 31 * 480 :].abs().max()) == 0.0


def test_a_seed_decides_the_noise(vocoder: SpectralVocoder) -> None:
    mel = torch.randn(1, 80, 20) - 5
    with torch.inference_mode():
        assert torch.equal(vocoder(mel, seed=1), vocoder(mel, seed=1))
        assert not torch.equal(vocoder(mel, seed=1), vocoder(mel, seed=2))


def test_silence_stays_silence(vocoder: SpectralVocoder) -> None:
    with torch.inference_mode():
        assert float(vocoder(torch.full((1, 80, 40), SILENCE)).abs().max()) < 1e-2


def test_the_base_filter_reads_the_level_of_a_tone_off_its_mel() -> None:
    at, rate = 1500.0, 24_000
    wave = 0.3 * torch.sin(2 * math.pi * at * torch.arange(rate) / rate)
    mel = prompt_mel(wave)[25]  # (80,)
    linear = SpectralVocoder(SMALL).to_linear @ mel
    assert int(linear.argmax()) == pytest.approx(at / (rate / 2) * (SMALL.bins - 1), abs=4)


def test_an_unknown_key_of_the_configuration_is_named() -> None:
    with pytest.raises(TypeError, match="colour"):
        SpectralVocoder.from_config({"colour": 1})
