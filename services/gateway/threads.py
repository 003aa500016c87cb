"""From the event loop into threads: everything below the gateway blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread

P = ParamSpec("P")
T = TypeVar("T")


async def blocking(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a blocking function in a thread."""
    return await to_thread.run_sync(partial(function, *args, **kwargs))


async def patiently(function: Callable[[], T], limiter: CapacityLimiter) -> T:
    """Call a function that waits for something, in a thread of `limiter`; a caller that leaves does not wait for it."""
    return await to_thread.run_sync(function, abandon_on_cancel=True, limiter=limiter)
