"""Modules made to be filled: names and shapes at once, and nothing of torch's compiler on the way to a first edit."""

import subprocess
import sys

import torch
from torch import nn

from shared.checkpoints.unfilled import unfilled

LOADS = """
import sys
from shared.checkpoints import Checkpoint
from shared.checkpoints.decoder import load_flow, load_vocoder
from shared.checkpoints.step1 import load_step1
from shared.checkpoints.tokenizer import load_linguistic
checkpoint = Checkpoint.resolve("nano")
for load in (load_linguistic, load_step1, load_flow, load_vocoder):
    load(checkpoint)
print(*(name for name in ("torch._dynamo", "sympy") if name in sys.modules))
"""


def test_modules_have_shapes_and_no_memory() -> None:
    with unfilled():
        module = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.Conv1d(3, 2, 5), nn.LayerNorm(2))
    assert {str(tensor.device) for tensor in module.state_dict().values()} == {"meta"}
    assert module[0].weight.shape == (7, 4)
    filled = {name: torch.zeros(tensor.shape) for name, tensor in module.state_dict().items()}
    module.load_state_dict(filled, assign=True)
    assert not module[1].weight.any()


def test_outside_modules_begin_with_values() -> None:
    with unfilled():
        pass
    assert nn.Linear(4, 3).weight.abs().sum() > 0


def test_loading_a_checkpoint_leaves_the_compiler_alone() -> None:
    done = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == ""
