"""Every stored type loads as every computing type."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.checkpoints.decoder import load_flow, load_vocoder
from shared.checkpoints.layout import Checkpoint
from shared.checkpoints.step1 import load_step1
from shared.checkpoints.verify import verify

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def stored(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root = shutil.copytree(tiny, tmp_path_factory.mktemp("stored") / "checkpoint")
    language_model = next(root.rglob("Step-Audio-EditX/model.safetensors"))
    save_file({name: tensor.to(request.param) for name, tensor in load_file(language_model).items()}, language_model)
    for path in root.rglob("*.pt"):
        torch.save({name: t.to(request.param) for name, t in torch.load(path, weights_only=True).items()}, path)
    return Checkpoint.resolve(root)


def test_verify_accepts_every_floating_point_type(stored: Checkpoint) -> None:
    assert verify(stored).ok


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_stored_type_computes_in_every_type(stored: Checkpoint, dtype: torch.dtype) -> None:
    hidden, logits = load_step1(stored, dtype=dtype)(torch.tensor([[1, 4, 78, 500]]))
    assert hidden.dtype == logits.dtype == dtype
    assert logits.isfinite().all()
    flow, vocoder = load_flow(stored, dtype=dtype), load_vocoder(stored, dtype=dtype)
    assert flow.encoder_proj.weight.dtype == dtype
    mel = flow.sample(
        torch.randint(0, 1024, (1, 9, 2)), torch.tensor([9]), torch.zeros(1, 6, 80), torch.tensor([6]),
        torch.randn(1, 192), torch.randn(1, 18, 80), steps=2,
    )  # fmt: skip
    wave = vocoder(mel.transpose(1, 2).to(torch.float32))
    assert wave.shape == (1, 18 * 480)
    assert wave.dtype == torch.float32
    assert wave.isfinite().all()
