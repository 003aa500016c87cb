"""Modules without memory for their tensors and without initial values, to be filled from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _WithoutInitialValues(TorchFunctionMode):
    """Leaves out what `torch.nn.init` would do. On the meta device it would load torch's compiler first, 1.6 s of a
    process's start."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        given = dict(kwargs or {})
        if getattr(func, "__module__", "") == nn.init.__name__:
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


@contextmanager
def unfilled() -> Iterator[None]:
    """Modules made inside have names and shapes, and no numbers: `load_state_dict(..., assign=True)` brings them."""
    with torch.device("meta"), _WithoutInitialValues():
        yield
