"""Rows of random codes over a tiny vocabulary of edits, and a language model small enough to be trained in seconds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from services.trainer.data.rows import Row, Side
from shared.checkpoints import Checkpoint
from shared.checkpoints.step1 import load_step1, load_text_tokenizer
from shared.codes import interleave
from shared.models.step1 import Step1
from shared.prompts import TextTokenizer
from shared.schemas.edit import Edit

torch.set_num_threads(1)

TEXT = "you know, I just finished that big project"


def random_codes(groups: int, seed: int, low: int = 0, high: int = 4096) -> np.ndarray:
    """Mixed ids whose semantic codes lie in [low, high)."""
    rng = np.random.default_rng(seed)
    return interleave(rng.integers(0, 8, groups * 2), rng.integers(low, high, groups * 3))


def make_row(number: int, *, detail: str = "happy", rejected: bool = False, margin: float | None = None) -> Row:
    """An emotion edit whose answers have low semantic codes when it is good and high ones when it is not."""
    target = Side(text=TEXT, mixed=random_codes(3, number + 1000, 0, 8))
    worse = Side(text=TEXT, mixed=random_codes(3, number + 2000, 8, 16)) if rejected else None
    return Row(
        id=f"row-{number}", edit=Edit(type="emotion", detail=detail), target=target, rejected=worse, margin=margin,
        source=Side(text=TEXT, mixed=random_codes(3, number)), speaker=f"speaker-{number % 3}", language="en",
        licence="CC0-1.0", origin="random",
    )  # fmt: skip


@pytest.fixture(scope="session")
def checkpoint(tiny: Path) -> Checkpoint:
    return Checkpoint.resolve(tiny)


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Checkpoint) -> TextTokenizer:
    return load_text_tokenizer(checkpoint)


@pytest.fixture
def fresh(checkpoint: Checkpoint) -> Callable[[], Step1]:
    """The tiny language model, a new copy every time."""
    return lambda: load_step1(checkpoint, dtype=torch.float32)
