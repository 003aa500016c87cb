"""The golden decoder: a small flow with random weights and what the official implementation makes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor

from shared.codes import time_align
from shared.models.flow import Flow, FlowConfig

torch.set_num_threads(1)  # these models are too small to share out
GOLDEN = Path(__file__).parents[3] / "data" / "golden" / "decoder_small"


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    """Inputs and outputs, the tokens aligned and the reference mel at two frames per token, time before channels."""
    io = load_file(GOLDEN / "io.safetensors")
    prompt, tokens = time_align(io["prompt_tokens"]), time_align(io["tokens"])
    prompt_mel = F.interpolate(io["prompt_mel"].transpose(1, 2), size=2 * len(prompt), mode="nearest").transpose(1, 2)
    return {
        "prompt": prompt,
        "tokens": tokens,
        "all_tokens": torch.cat([prompt, tokens]),
        "prompt_mel": prompt_mel[0],
        "speaker": io["speaker_embedding"][0],
        "noise": io["noise"][0].T,
        "mel": io["mel"][0].T,
    }


@pytest.fixture(scope="session")
def config() -> dict[str, Any]:
    """The golden cosyvoice.yaml."""
    loaded: dict[str, Any] = yaml.safe_load((GOLDEN / "cosyvoice.yaml").read_text())
    return loaded


@pytest.fixture(scope="session")
def flow(config: dict[str, Any]) -> Flow:
    """The golden flow, weights loaded strictly."""
    model = Flow(FlowConfig.from_dict(config["flow"])).eval()
    model.load_state_dict(torch.load(GOLDEN / "flow.pt", weights_only=True))
    return model
