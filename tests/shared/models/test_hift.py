"""HiFT against the official implementation, and batches against single runs."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from shared.models.hift import HiFT, HiFTConfig
from shared.models.vocoder_stream import VocoderStream
from shared.models.weight_norm import fold_weight_norm

torch.set_num_threads(1)  # these models are too small to share out
GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "decoder_small"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "io.safetensors")


def load() -> HiFT:
    config = yaml.safe_load((GOLDEN / "cosyvoice.yaml").read_text())["hift"]
    model = HiFT(HiFTConfig.from_dict(config)).eval()
    model.load_state_dict(fold_weight_norm(torch.load(GOLDEN / "hift.pt", weights_only=True)))
    return model


@pytest.fixture
def hift() -> HiFT:
    return load()


@pytest.fixture
def silent_source() -> HiFT:
    model = load()
    model.noise_scale = 0.0
    return model


def signal_to_noise_db(wanted: Tensor, got: Tensor) -> float:
    return float(10 * torch.log10(wanted.var() / (wanted - got).var()))


def stream(model: HiFT, mel: Tensor, sizes: list[int], seed: int = 0) -> Tensor:
    vocoder = VocoderStream(model, seed=seed)
    chunks = mel.split([*sizes, mel.shape[1] - sum(sizes)], dim=1)
    return torch.cat([vocoder.push(chunk, last=i == len(chunks) - 1) for i, chunk in enumerate(chunks)])


def test_the_pitch_is_the_official_one(hift: HiFT, golden: dict[str, Tensor]) -> None:
    assert (hift.f0(golden["mel"]) - golden["f0"]).abs().max() < 1e-3


def test_the_waveform_without_source_noise_is_the_official_one(silent_source: HiFT, golden: dict[str, Tensor]) -> None:
    assert (silent_source(golden["mel"]) - golden["wav"]).abs().max() < 1e-3


def test_the_published_sizes_have_the_published_tensors() -> None:
    with torch.device("meta"):
        state = HiFT(HiFTConfig()).state_dict()
    assert len(state) == 246
    assert state["ups.2.weight"].shape == (128, 64, 7)
    assert state["source_downs.0.weight"].shape == (256, 18, 30)
    assert state["f0_predictor.condnet.8.weight"].shape == (512, 512, 3)


def test_the_transform_sizes_may_be_nested_as_in_the_published_configuration() -> None:
    config = HiFTConfig.from_dict({"istft_params": {"n_fft": 32, "hop_len": 8}, "f0_predictor": {"cond_channels": 64}})
    assert (config.istft_n_fft, config.istft_hop_len, config.f0_channels, config.hop) == (32, 8, 64, 960)


def test_a_batch_of_different_lengths_equals_single_runs(hift: HiFT) -> None:
    mel = torch.randn(3, 80, 40, generator=torch.Generator().manual_seed(0))
    lengths, seeds = [40, 23, 31], [4, 5, 6]
    batch = hift(mel, torch.tensor(lengths), seeds)
    for i, (length, seed) in enumerate(zip(lengths, seeds, strict=True)):
        alone = hift(mel[i : i + 1, :, :length], None, [seed])[0]
        torch.testing.assert_close(batch[i, : length * 480], alone, atol=1e-5, rtol=1e-4)
        assert not batch[i, length * 480 :].any()


def test_the_seed_decides_the_source_noise(hift: HiFT, golden: dict[str, Tensor]) -> None:
    mel = golden["mel"]
    assert torch.equal(hift(mel, None, [1]), hift(mel, None, [1]))
    assert not torch.equal(hift(mel, None, [1]), hift(mel, None, [2]))


def test_lower_precision_keeps_pitch_and_phase_in_float32(golden: dict[str, Tensor]) -> None:
    """Measured on random weights: 34 dB below the signal."""
    wanted, half = load(), load().lower_precision(torch.bfloat16)
    torch.testing.assert_close(half.f0(golden["mel"]), wanted.f0(golden["mel"]))
    assert signal_to_noise_db(wanted(golden["mel"]), half(golden["mel"])) > 25


def test_a_stream_sounds_as_one_pass_does(hift: HiFT, golden: dict[str, Tensor]) -> None:
    """The source goes on through the seams without a break. Measured: 73 dB; the published seams give 19 dB."""
    wanted = hift(golden["mel"], None, [9])[0]
    assert signal_to_noise_db(wanted, stream(hift, golden["mel"][0], [30, 24], seed=9)) > 50


@pytest.mark.parametrize("sizes", [[2, 2, 2, 2, 2, 2, 2, 2, 2], [84], [3, 60]])
def test_chunks_of_any_size_make_all_samples(hift: HiFT, golden: dict[str, Tensor], sizes: list[int]) -> None:
    wave = stream(hift, golden["mel"][0], sizes, seed=9)
    assert len(wave) == 84 * 480
    assert signal_to_noise_db(hift(golden["mel"], None, [9])[0], wave) > 30
