"""Learning rates as functions of the step. Knows nothing about optimizers but how to set theirs."""

from __future__ import annotations

import math

import torch


def cosine(step: int, total: int, peak: float, final: float, warmup: int = 0) -> float:
    """Half a cosine from `peak` at step `warmup` to `final` at step `total - 1`, after a linear rise to the peak.

    Steps count from 0. Beyond the end the rate stays at `final`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    span = total - 1 - warmup
    share = 1.0 if span <= 0 and step > warmup else min(1.0, (step - warmup) / max(1, span))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * share))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Give every parameter group the rate; returns it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
