"""The recogniser of a checkpoint: `recognizer.safetensors`, its sizes in the file's metadata.

Not part of the published release; a small checkpoint has one to choose among candidates by their words.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from shared.checkpoints.layout import Checkpoint, InvalidCheckpoint
from shared.checkpoints.unfilled import unfilled
from shared.checkpoints.weights import read_weights
from shared.models.recognizer import Recognizer, RecognizerConfig


def read_config(file: Path) -> RecognizerConfig:
    """The sizes of the recogniser in a file. Raises InvalidCheckpoint."""
    try:
        with safe_open(file, framework="pt") as opened:
            return RecognizerConfig(**json.loads(opened.metadata()["editx"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InvalidCheckpoint(f"{file} is no recogniser: {error}", "Fetch or train it again.") from error


def load_recognizer(checkpoint: Checkpoint) -> Recognizer:
    """The recogniser in eval mode, in float32, on the CPU. Raises MissingComponent, InvalidCheckpoint."""
    file = checkpoint.recognizer_file
    config = read_config(file)
    with unfilled():
        model = Recognizer(config)
    state = {name: tensor.float() for name, tensor in read_weights(file).items()}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise InvalidCheckpoint(f"{file} does not fit its sizes: {error}", "Fetch or train it again.") from error
    return model.requires_grad_(False).eval()


def save_recognizer(model: Recognizer, file: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the weights with their sizes."""
    tensors = {name: value.detach().cpu().to(dtype).contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, file, metadata={"format": "pt", "editx": json.dumps(asdict(model.config))})
