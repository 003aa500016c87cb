"""From the event loop into threads: everything below the gateway blocks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import ParamSpec, TypeVar

import anyio
from anyio import CapacityLimiter, to_thread

P = ParamSpec("P")
T = TypeVar("T")


async def blocking(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a blocking function in a thread."""
    return await to_thread.run_sync(partial(function, *args, **kwargs))


async def patiently(function: Callable[[], T], limiter: CapacityLimiter) -> T:
    """Call a function that waits for something, in a thread of `limiter`; a caller that leaves does not wait for it."""
    return await to_thread.run_sync(function, abandon_on_cancel=True, limiter=limiter)


async def pulled(iterator: Iterator[T]) -> AsyncIterator[T]:
    """The items of a blocking iterator. It is closed when the reader leaves, which ends the work behind it."""
    end = object()
    try:
        while (item := await to_thread.run_sync(next, iterator, end)) is not end:
            yield item  # type: ignore[misc]
    finally:
        with anyio.CancelScope(shield=True), suppress(ValueError):
            close = getattr(iterator, "close", None)
            if close is not None:
                await to_thread.run_sync(close)
