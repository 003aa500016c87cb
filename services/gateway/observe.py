"""Around every request: its id, its span, its log line, its metrics, and a limit on the size of its body.

Plain ASGI, so that answers stream. Knows nothing about routes beyond their path templates.
"""

from __future__ import annotations

import contextvars
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable

from opentelemetry.trace import SpanKind, Status, StatusCode
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.metrics import Metrics
from shared import telemetry

log = logging.getLogger("editx.access")
REQUEST_ID = "x-request-id"
QUIET = frozenset({"/healthz", "/readyz", "/metrics"})
OnDefect = Callable[[Request, Exception], Awaitable[Response]]
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{7,127}")
_current: contextvars.ContextVar[str] = contextvars.ContextVar("editx_request_id", default="")


def request_id() -> str:
    """The id of the request that is being answered."""
    return _current.get()


class Observed:
    """ASGI middleware. A client's own request id is kept where it looks like one.

    An exception that nobody foresaw is answered by `on_defect`.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, max_body: int, on_defect: OnDefect) -> None:
        self._app = app
        self._metrics = metrics
        self._on_defect = on_defect
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        identity = given if _ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        reset = _current.set(identity)
        try:
            with telemetry.log_fields(request_id=identity):
                await self._observed(scope, _limited(receive, self._max_body), send, headers, identity)
        finally:
            _current.reset(reset)

    async def _observed(self, scope: Scope, receive: Receive, send: Send, headers: Headers, identity: str) -> None:
        method, began, status, first_s = str(scope["method"]), time.perf_counter(), 500, 0.0
        with telemetry.tracer().start_as_current_span(
            method, telemetry.extract(dict(headers)), SpanKind.SERVER, {"http.request.method": method}
        ) as span:

            async def tell(message: Message) -> None:
                nonlocal status, first_s
                if message["type"] == "http.response.start":
                    status, first_s = int(message["status"]), time.perf_counter() - began
                    answer = MutableHeaders(scope=message)
                    answer[REQUEST_ID] = identity
                    if "traceparent" in (carried := telemetry.inject()):
                        answer["traceparent"] = carried["traceparent"]
                await send(message)

            try:
                await self._app(scope, receive, tell)
            except Exception as error:
                if first_s:  # the answer has begun: all that is left is to break it off
                    raise
                await (await self._on_defect(Request(scope), error))(scope, receive, tell)
            finally:
                route = getattr(scope.get("route"), "path", "unmatched")
                span.update_name(f"{method} {route}")
                span.set_attributes({"http.route": route, "http.response.status_code": status})
                if status >= 500:
                    span.set_status(Status(StatusCode.ERROR))
                self._metrics.requests.labels(method, route, status).inc()
                self._metrics.request_s.labels(method, route).observe(first_s)
                level = logging.DEBUG if route in QUIET else logging.INFO
                log.log(
                    level, "%s %s %d in %.1f ms", method, scope["path"], status, 1e3 * (time.perf_counter() - began)
                )


def _limited(receive: Receive, limit: int) -> Receive:
    """A receive that refuses a body as soon as it has grown past the limit, whatever its header says."""
    received = 0

    async def limited() -> Message:
        nonlocal received
        message = await receive()
        if message["type"] == "http.request":
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413, f"The body is larger than {limit} bytes.")
        return message

    return limited
