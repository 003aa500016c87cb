"""Loading the flow and the vocoder: kinds, formats, tags as data, and errors that name file and tensor."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from shared.checkpoints.decoder import build_vocoder, load_flow, load_vocoder, read_config, read_yaml
from shared.checkpoints.layout import Checkpoint, InvalidCheckpoint
from shared.errors import MissingComponent
from shared.models.bigvgan import BigVGAN, BigVGANConfig
from shared.models.hift import HiFT
from shared.models.spectral import SpectralRows, SpectralVocoder

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
PUBLISHED_STYLE = """
sample_rate: 24000
flow: !new:stepvocoder.cosyvoice2.flow.flow.CausalMaskedDiffWithXvec
  vocab_size: 5121
  input_embedding: !new:stepvocoder.cosyvoice2.embedding.dual_codebook.DualCodebookEmbedding
    vocab_size: !ref <flow[vocab_size]>
hift: !new:stepvocoder.cosyvoice2.hifigan.generator.HiFTGenerator
  sampling_rate: !ref <sample_rate>
  upsample_rates: [8, 5, 3]
  f0_predictor: !new:ConvRNNF0Predictor
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden decoder that a test may change."""
    return Path(shutil.copytree(GOLDEN / "decoder_small", tmp_path / "decoder"))


def rewrite(folder: Path, change: dict[str, Any]) -> Checkpoint:
    path = folder / "cosyvoice.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    return Checkpoint.resolve(folder)


def test_the_golden_decoder_loads_in_float32_and_in_bfloat16(folder: Path) -> None:
    checkpoint = Checkpoint.resolve(folder)
    assert load_flow(checkpoint).encoder_proj.weight.dtype == torch.float32
    assert load_flow(checkpoint, dtype=torch.bfloat16).encoder_proj.weight.dtype == torch.bfloat16
    vocoder = load_vocoder(checkpoint, dtype=torch.bfloat16)
    assert isinstance(vocoder, HiFT)
    assert vocoder.conv_pre.weight.dtype == torch.bfloat16
    assert vocoder.f0_predictor.classifier.weight.dtype == torch.float32


def test_safetensors_are_read_as_pickles_are(folder: Path) -> None:
    wanted = load_flow(Checkpoint.resolve(folder)).state_dict()
    save_file(torch.load(folder / "flow.pt", weights_only=True), folder / "flow.safetensors")
    (folder / "flow.pt").unlink()
    found = load_flow(Checkpoint.resolve(folder)).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())


def test_a_folder_with_a_bigvgan_alone_is_a_vocoder() -> None:
    assert isinstance(load_vocoder(Checkpoint.resolve(GOLDEN / "bigvgan_small")), BigVGAN)


def test_a_generator_as_nvidia_published_it_loads_with_its_weight_norm(tmp_path: Path) -> None:
    """A folder of config.json and bigvgan_generator.pt, whose tensors lie under `generator`, weights as g and v."""
    settings = {
        "resblock": "1", "batch_size": 32, "learning_rate": 0.0001, "lr_decay": 0.9999996, "seed": 1234,
        "upsample_rates": [8, 5, 4, 3], "upsample_kernel_sizes": [16, 11, 8, 7], "upsample_initial_channel": 32,
        "resblock_kernel_sizes": [3, 7, 11], "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
        "use_tanh_at_final": False, "use_bias_at_final": False, "activation": "snakebeta", "snake_logscale": True,
        "use_cqtd_instead_of_mrd": True, "segment_size": 65536, "num_mels": 80, "num_freq": 1025, "n_fft": 1920,
        "hop_size": 480, "win_size": 1920, "sampling_rate": 24000, "fmin": 0, "fmax": None, "num_workers": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    wanted = BigVGAN(BigVGANConfig.from_nvidia(settings)).eval()
    published: dict[str, torch.Tensor] = {}
    for name, tensor in wanted.state_dict().items():
        if name.endswith(".weight"):
            size = torch.linalg.vector_norm(tensor.flatten(1), dim=1).view(-1, *[1] * (tensor.ndim - 1))
            published |= {f"{name}_g": size, f"{name}_v": tensor * 3}
        else:
            published[name] = tensor
    assert {"conv_pre.weight_g", "ups.0.0.weight_v", "resblocks.0.activations.0.act.beta"} <= published.keys()
    (tmp_path / "config.json").write_text(json.dumps(settings))
    torch.save({"generator": published}, tmp_path / "bigvgan_generator.pt")
    vocoder = load_vocoder(Checkpoint.resolve(tmp_path))
    assert isinstance(vocoder, BigVGAN)
    mel = torch.randn(1, 80, 7)
    torch.testing.assert_close(vocoder(mel), wanted(mel))


def test_the_section_chooses_the_vocoder(folder: Path) -> None:
    sections = {"spectral": {"hidden": 8, "blocks": 1, "fine_blocks": 1, "f0_hidden": 8, "f0_blocks": 1}}
    checkpoint = rewrite(folder, sections)
    model = build_vocoder(checkpoint)
    assert isinstance(model, SpectralVocoder)
    (folder / "hift.pt").unlink()
    save_file(model.state_dict(), folder / "hift.safetensors")
    vocoder = load_vocoder(checkpoint)
    assert isinstance(vocoder, SpectralRows)
    mel = torch.randn(2, 80, 12)
    both = vocoder(mel, torch.tensor([12, 9]), [3, 4])
    assert both.shape == (2, 12 * 480)
    torch.testing.assert_close(both[1], vocoder(mel[1:], torch.tensor([9]), [4])[0], atol=1e-5, rtol=1e-4)


def test_hyperpyyaml_tags_are_data_and_references_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "cosyvoice.yaml"
    path.write_text(PUBLISHED_STYLE)
    config = read_config(Checkpoint.resolve(tmp_path))
    assert config["hift"]["!"].endswith("HiFTGenerator")
    assert config["hift"]["sampling_rate"] == 24000
    assert config["flow"]["input_embedding"]["vocab_size"] == 5121
    assert config["hift"]["f0_predictor"] == {"!": "new:ConvRNNF0Predictor"}
    with torch.device("meta"):
        assert isinstance(build_vocoder(Checkpoint.resolve(tmp_path)), HiFT)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: !!python/object/apply:os.system ['true']", "cannot be read"),
        ("a: !ref <nothing>", "leads nowhere"),
        ("a: !ref <b>\nb: !ref <a>", "circle"),
        ("- 1", "no settings"),
        ("a: [", "cannot be read"),
    ],
)
def test_what_is_not_plain_settings_is_refused_with_the_file_s_name(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "cosyvoice.yaml"
    path.write_text(text)
    with pytest.raises(InvalidCheckpoint, match=complaint) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)


def test_missing_unknown_and_misshapen_tensors_are_named_with_the_file(folder: Path) -> None:
    path = folder / "flow.pt"
    state = torch.load(path, weights_only=True)
    weight = state.pop("encoder_proj.weight")
    for change, complaint in (
        ({}, r"flow\.pt lacks tensors: encoder_proj\.weight"),
        ({"encoder_proj.weight": weight, "more": weight}, r"flow\.pt has unknown tensors: more"),
        (
            {"encoder_proj.weight": weight.T},
            r"encoder_proj\.weight is \(64, 80\), the configuration makes it \(80, 64\)",
        ),
    ):
        torch.save({**state, **change}, path)
        with pytest.raises(InvalidCheckpoint, match=complaint):
            load_flow(Checkpoint.resolve(folder))


def test_half_of_a_weight_norm_pair_is_named_with_the_file(folder: Path) -> None:
    state = torch.load(folder / "hift.pt", weights_only=True)
    del state["conv_pre.parametrizations.weight.original0"]
    torch.save(state, folder / "hift.pt")
    with pytest.raises(InvalidCheckpoint, match=r"hift\.pt lacks the tensor conv_pre\.parametrizations"):
        load_vocoder(Checkpoint.resolve(folder))


def test_a_vocoder_of_another_frame_rate_is_refused(folder: Path) -> None:
    section = {"upsample_rates": [4, 4], "upsample_kernel_sizes": [8, 8], "hop_size": 16}
    with pytest.raises(InvalidCheckpoint, match="makes 16 samples per mel frame"):
        build_vocoder(rewrite(folder, {"bigvgan": section}))


@pytest.mark.parametrize("size", ["istft_hop_len", "base_channels", "upsample_rates"])
def test_a_vocoder_s_size_that_is_no_number_is_refused(folder: Path, size: str) -> None:
    with pytest.raises(InvalidCheckpoint, match="decoder configuration"):
        build_vocoder(rewrite(folder, {"hift": {size: None}}))


def test_no_vocoder_and_no_flow_are_said_so(tmp_path: Path) -> None:
    (tmp_path / "cosyvoice.yaml").write_text("mel_conf: {}")
    checkpoint = Checkpoint.resolve(tmp_path)
    with pytest.raises(InvalidCheckpoint, match="describes no vocoder"):
        build_vocoder(checkpoint)
    with pytest.raises(InvalidCheckpoint, match="no section 'flow'"):
        load_flow(checkpoint)


def test_a_missing_file_is_a_missing_component(folder: Path) -> None:
    (folder / "flow.pt").unlink()
    with pytest.raises(MissingComponent, match="flow"):
        load_flow(Checkpoint.resolve(folder))
