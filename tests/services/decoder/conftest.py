"""The golden decoder as a served model, and its requests."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from services.decoder.model import DecoderModel
from services.decoder.settings import DecoderSettings
from shared.checkpoints.layout import Checkpoint
from shared.inference.port import InferenceRequest

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "decoder_small"
torch.set_num_threads(1)  # these models are too small to share out


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(scope="session")
def model() -> DecoderModel:
    return DecoderModel(Checkpoint.resolve(GOLDEN), settings=DecoderSettings(dtype="float32"))


@pytest.fixture
def asked(golden: dict[str, Tensor]) -> InferenceRequest:
    inputs = {
        "mixed": golden["tokens"].numpy(),
        "prompt_mixed": golden["prompt_tokens"].numpy(),
        "prompt_mel": golden["prompt_mel"][0].numpy(),
        "speaker_embedding": golden["speaker_embedding"][0].numpy(),
    }
    return InferenceRequest(inputs, {"steps": 4, "seed": 11})
