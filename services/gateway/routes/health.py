"""Whether the process lives, whether it can work, and its numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from services.gateway.dependencies import GatewayOf
from services.gateway.threads import blocking
from shared.errors import EditxError

router = APIRouter(tags=["health"])
MODELS = ("tokenizer", "llm", "decoder")


@router.get("/healthz", response_model=dict[str, str])
async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz", response_model=dict[str, str], responses={503: {"model": dict[str, str]}})
async def ready(gateway: GatewayOf) -> Response:
    """Bus, store and job store answer; 503 names those that do not.

    Models are named too and decide nothing: jobs are accepted while they are being started.
    """
    backend = gateway.backend
    checks: dict[str, Callable[[], None]] = {
        "bus": backend.bus.ping,
        "store": backend.store.ping,
        "jobs": backend.jobs.ping,
    }
    found = {name: await blocking(_state, check) for name, check in checks.items()}
    is_ready = all(state == "ok" for state in found.values())
    for name in MODELS:
        found[name] = "ok" if await blocking(partial(backend.inference.ready, name)) else "not ready"
    return JSONResponse({"status": "ok" if is_ready else "not ready", **found}, 200 if is_ready else 503)


@router.get("/metrics", include_in_schema=False)
async def metrics(gateway: GatewayOf) -> Response:
    """Everything in Prometheus' exposition format."""
    return Response(await blocking(gateway.metrics.text), media_type="text/plain; version=0.0.4; charset=utf-8")


def _state(check: Callable[[], None]) -> str:
    try:
        check()
    except EditxError as error:
        return error.message
    return "ok"
