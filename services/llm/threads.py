"""How many threads the products of a small model run on, on a CPU: one.

An OpenMP runtime keeps a pool for every thread that computes. Where the pools of a process have more threads than the
machine has cores, they sleep instead of spinning between two products, and to wake them costs five times what a small
product takes. Knows nothing about what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shared.models.step1 import Step1

SMALL_WEIGHTS = 1 << 20
"""Largest matrix of a layer that one core multiplies with a few rows in less than the time to wake another."""


def is_small(model: Step1) -> bool:
    """Whether a decode step is faster on one thread."""
    config = model.config
    return model.device.type == "cpu" and config.hidden_size * config.intermediate_size < SMALL_WEIGHTS


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's number of threads for the calling thread, and for threads that begin meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
