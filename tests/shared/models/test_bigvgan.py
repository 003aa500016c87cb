"""BigVGAN against the official implementation, both published layouts, and streams."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shared.models.bigvgan import BigVGAN, BigVGANConfig
from shared.models.vocoder_stream import VocoderStream, crossfade
from shared.models.weight_norm import fold_weight_norm

torch.set_num_threads(1)  # these models are too small to share out
GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "bigvgan_small"


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(GOLDEN / "hift.pt", weights_only=True)
    return state


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(scope="module")
def model(published: dict[str, Tensor]) -> BigVGAN:
    vocoder = BigVGAN(BigVGANConfig.from_dict(json.loads((GOLDEN / "config.json").read_text()))).eval()
    vocoder.load_state_dict(fold_weight_norm(published))
    return vocoder


def test_the_waveform_is_the_official_one(model: BigVGAN, golden: dict[str, Tensor]) -> None:
    assert (model(golden["mel"]) - golden["wav"][:, 0]).abs().max() < 1e-3


def test_old_and_new_weight_norm_names_fold_to_the_same_weights(published: dict[str, Tensor]) -> None:
    renamed = {
        name.replace(".weight_g", ".parametrizations.weight.original0").replace(
            ".weight_v", ".parametrizations.weight.original1"
        ): tensor
        for name, tensor in published.items()
    }
    old, new = fold_weight_norm(published), fold_weight_norm(renamed)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert fold_weight_norm(old).keys() == old.keys()


def test_half_of_a_weight_norm_pair_is_an_error_that_names_the_other(published: dict[str, Tensor]) -> None:
    for lost in ("conv_pre.weight_g", "conv_pre.weight_v"):
        with pytest.raises(KeyError, match=lost):
            fold_weight_norm({name: tensor for name, tensor in published.items() if name != lost})


def test_nvidia_s_layout_pads_with_zeros_and_bounds_by_tanh() -> None:
    settings = {
        "num_mels": 20,
        "upsample_initial_channel": 16,
        "upsample_rates": [4, 2],
        "upsample_kernel_sizes": [8, 4],
        "resblock": "2",
        "activation": "snake",
        "sampling_rate": 22050,
        "hop_size": 8,
    }
    vocoder = BigVGAN(BigVGANConfig.from_nvidia(settings)).eval()
    state = vocoder.state_dict()
    assert {"conv_post.bias", "ups.1.0.weight", "resblocks.5.convs.2.weight"} <= state.keys()
    assert "activation_post.act.beta" not in state
    assert vocoder(torch.randn(2, 20, 9)).shape == (2, 72)
    assert vocoder.conv_pre.padding == (3,)


def test_unknown_choices_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"bigvgan\.activation"):
        BigVGANConfig.from_dict({"activation": "relu"})


def test_a_batch_of_different_lengths_equals_single_runs(model: BigVGAN, golden: dict[str, Tensor]) -> None:
    mel = torch.cat([golden["mel"], golden["mel"].flip(2)])
    batch = model(mel, torch.tensor([40, 17]))
    torch.testing.assert_close(batch[1, : 17 * 480], model(mel[1:, :, :17])[0])
    assert not batch[1, 17 * 480 :].any()


def test_a_stream_stays_near_one_pass(model: BigVGAN, golden: dict[str, Tensor]) -> None:
    """Measured on random weights: 36 dB; without the frames of context 21 dB."""
    stream, mel = VocoderStream(model), golden["mel"][0]
    wave = torch.cat([stream.push(mel[:, :15]), stream.push(mel[:, 15:25]), stream.push(mel[:, 25:], last=True)])
    wanted = model(golden["mel"])[0]
    assert wave.shape == wanted.shape
    assert 10 * torch.log10(wanted.var() / (wave - wanted).var()) > 30


def test_a_crossfade_of_equal_signals_changes_nothing() -> None:
    signal = torch.randn(50)
    torch.testing.assert_close(crossfade(signal[:20], signal), signal)
