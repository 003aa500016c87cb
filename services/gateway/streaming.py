"""An answer that streams from a blocking iterator, and ends its work as soon as the listener has gone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping

import anyio
from anyio import to_thread
from fastapi import Response
from starlette.types import Receive, Scope, Send

from shared.inference.port import RequestCancelled


class Streamed(Response):
    """Sends the pieces of a blocking generator.

    `stop` is set when the listener leaves; the generator is then expected to end soon, with RequestCancelled if it
    likes. Once it has ended, however it did, it is closed and `on_end` is called.
    """

    def __init__(
        self,
        pieces: Generator[bytes, None, None],
        stop: threading.Event,
        on_end: Callable[[], None],
        *,
        media_type: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(None, 200, headers, media_type)
        del self.headers["content-length"]
        self._pieces = pieces
        self._stop = stop
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:

            async def listen() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                self._stop.set()
                group.cancel_scope.cancel()

            group.start_soon(listen)
            try:
                await self._send(send)
            except RequestCancelled:
                pass
            finally:
                self._stop.set()
                with anyio.CancelScope(shield=True):
                    await to_thread.run_sync(self._pieces.close)
                self._on_end()
                group.cancel_scope.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while (piece := await to_thread.run_sync(next, self._pieces, None)) is not None:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
