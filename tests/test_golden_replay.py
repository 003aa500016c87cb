"""Every golden folder replayed and compared with what the official implementation gave."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.checkpoints.replay import detect, replay
from shared.errors import UserError

GOLDEN = Path(__file__).parent / "data" / "golden"
CLIPS = ("en_happy_prompt", "zero_shot_en_prompt")

# folder -> the outputs that its README names, with the largest difference allowed
TOLERANCES = {
    "step1_small": {"hidden_states": 2e-4, "logits": 2e-4},
    "decoder_small": {"tokens_time_aligned": 0.0, "mel": 1e-3, "f0": 1e-3, "wav": 1e-3},
    "bigvgan_small": {"wav": 1e-3},
    "linguistic_small": {f"{clip}.{name}": 1e-2 for clip in CLIPS for name in ("features", "encoder_out")},
}


def run(folder: str, tmp_path: Path) -> dict[str, Tensor]:
    result = replay(GOLDEN / folder, tmp_path / "out.safetensors")
    outputs = load_file(tmp_path / "out.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in outputs.items()} == result.shapes
    return outputs


@pytest.mark.parametrize("folder", TOLERANCES)
def test_replay_gives_the_official_outputs(folder: str, tmp_path: Path) -> None:
    expected, outputs = load_file(GOLDEN / folder / "io.safetensors"), run(folder, tmp_path)
    for name, tolerance in TOLERANCES[folder].items():
        assert outputs[name].shape == expected[name].shape, name
        difference = (outputs[name].double() - expected[name].double()).abs().max().item()
        assert difference <= tolerance, f"{name}: {difference}"


def test_replay_gives_the_official_codes_where_the_nearest_centroid_is_clear(tmp_path: Path) -> None:
    expected, outputs = load_file(GOLDEN / "linguistic_small/io.safetensors"), run("linguistic_small", tmp_path)
    centroids = torch.from_numpy(np.load(GOLDEN / "linguistic_small/linguistic_tokenizer.npy"))
    for clip in CLIPS:
        nearest = torch.cdist(expected[f"{clip}.encoder_out"][0], centroids).topk(2, largest=False).values
        clear = nearest[:, 1] - nearest[:, 0] > 1e-3
        assert torch.equal(outputs[f"{clip}.codes"][clear], expected[f"{clip}.codes"][clear])


def test_replay_of_recordings_gives_the_official_features(tmp_path: Path) -> None:
    outputs = run("frontend_small", tmp_path)
    for path in sorted((GOLDEN / "frontend_small").glob("*.safetensors")):
        for name, expected in load_file(path).items():
            found = outputs[f"{path.stem}.{name}"]
            assert found.shape == expected.shape
            assert (found - expected).abs().max() <= (1e-4 if name == "trimmed_16k" else 1e-2), f"{path.stem}.{name}"


@pytest.mark.parametrize("folder", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_every_golden_folder_is_recognised(folder: str) -> None:
    assert detect(GOLDEN / folder) == folder.removesuffix("_small").replace("bigvgan", "vocoder")


def test_a_folder_without_a_component_or_without_inputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no component"):
        detect(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        detect(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"io\.safetensors does not exist"):
        replay(tmp_path, tmp_path / "out.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        detect(tmp_path)


@pytest.mark.parametrize("folder", ["step1_small", "linguistic_small"])
def test_damaged_inputs_are_refused_and_nothing_is_written(folder: str, tmp_path: Path) -> None:
    copied, out = Path(shutil.copytree(GOLDEN / folder, tmp_path / folder)), tmp_path / "out.safetensors"
    (copied / "io.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"io\.safetensors is not a file of tensors"):
        replay(copied, out)
    (copied / "io.safetensors").unlink()
    with pytest.raises(UserError, match=r"io\.safetensors does not exist"):
        replay(copied, out)
    assert not out.exists()


def test_inputs_of_another_shape_are_refused(tmp_path: Path) -> None:
    copied = Path(shutil.copytree(GOLDEN / "step1_small", tmp_path / "step1"))
    save_file({"input_ids": torch.full((1, 4), 10**6)}, copied / "io.safetensors")
    with pytest.raises(UserError, match="cannot run on the inputs"):
        replay(copied, tmp_path / "out.safetensors")


def test_outputs_that_cannot_be_written_are_refused_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        replay(GOLDEN / "step1_small", tmp_path / "file" / "out.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        replay(GOLDEN / "step1_small", tmp_path)
