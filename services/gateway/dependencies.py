"""What routes ask for: the gateway, who calls, and the headers that several of them read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import Depends, Header, Request
from fastapi.security import HTTPBearer
from fastapi.security.http import HTTPAuthorizationCredentials

from services.gateway.access import Principal
from services.gateway.gateway import Gateway
from services.gateway.problems import Conflict
from services.gateway.submission import idempotency_key

_bearer = HTTPBearer(auto_error=False, description="An API key. Not needed where the gateway has no keys file.")
_PREFER_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})\"?")


def gateway(request: Request) -> Gateway:
    found: Gateway = request.app.state.gateway
    return found


GatewayOf = Annotated[Gateway, Depends(gateway)]


def principal(
    gateway: GatewayOf,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    x_api_key: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> Principal:
    """Whoever calls. Raises Unauthorized."""
    return gateway.keys.principal(bearer.credentials if bearer else x_api_key)


Caller = Annotated[Principal, Depends(principal)]


def paying(gateway: GatewayOf, principal: Caller) -> Principal:
    """Whoever calls for work, which counts against their rate. Raises Unauthorized, TooMuch."""
    gateway.admission.call(principal)
    return principal


PayingCaller = Annotated[Principal, Depends(paying)]


def _idempotency(
    value: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            description="The same key and body give the same job for a day; another body is refused with 422.",
            examples=["8e03978e-40d5-43dd-bc93-6894a57f9324"],
        ),
    ] = None,
) -> str | None:
    return idempotency_key(value)


IdempotencyKey = Annotated[str | None, Depends(_idempotency)]


def _wait(
    prefer: Annotated[
        str | None, Header(description="`wait=N`: answer with the finished job within N seconds.", examples=["wait=10"])
    ] = None,
) -> float:
    match = _PREFER_WAIT.search(prefer or "")
    return float(match[1]) if match else 0.0


WaitS = Annotated[float, Depends(_wait)]


@contextmanager
def once(gateway: Gateway, principal: Principal, key: str | None) -> Iterator[None]:
    """One request at a time for an idempotency key. Raises Conflict while another one is being accepted."""
    if key is None:
        yield
        return
    mark = principal.id, key
    with gateway.lock:
        if mark in gateway.in_flight:
            raise Conflict(f"A request with the idempotency key {key!r} is being accepted now.", "Ask again shortly.",
                           "idempotency_in_progress")  # fmt: skip
        gateway.in_flight.add(mark)
    try:
        yield
    finally:
        with gateway.lock:
            gateway.in_flight.discard(mark)
