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
from shared.models.recognizer import Recognizer, RecognizerConfig


def read_config(file: Path) -> RecognizerConfig:
    """The sizes of the recogniser in a file. Raises InvalidCheckpoint."""
    try:
        with safe_open(file, framework="pt") as opened:
            return RecognizerConfig(**json.loads(opened.metadata()["editx"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InvalidCheckpoint(f"{file} is no recogniser: {error}", "Fetch or train it again.") from error


def load_recognizer(checkpoint: Checkpoint, *, device: str | torch.device = "cpu") -> Recognizer:
    """The recogniser in eval mode, in float32. Raises MissingComponent, InvalidCheckpoint."""
    file = checkpoint.recognizer_file
    model = Recognizer(read_config(file))
    try:
        with safe_open(file, framework="pt") as opened:
            model.load_state_dict({name: opened.get_tensor(name).float() for name in opened.keys()})  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InvalidCheckpoint(f"{file} does not fit its sizes: {error}", "Fetch or train it again.") from error
    return model.to(device).eval()


def save_recognizer(model: Recognizer, file: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the weights with their sizes."""
    tensors = {name: value.detach().cpu().to(dtype).contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, file, metadata={"format": "pt", "editx": json.dumps(asdict(model.config))})
