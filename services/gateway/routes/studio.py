"""The web studio: a static page, served from beside this code. Its files are few and named here."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse

router = APIRouter(include_in_schema=False)
FOLDER = Path(__file__).resolve().parents[1] / "studio"
TYPES = {
    "studio.css": "text/css",
    "studio.js": "text/javascript",
    "audio.js": "text/javascript",
    "voices.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
HEADERS = {
    "content-security-policy": "default-src 'self'; media-src 'self' blob:; connect-src 'self'; img-src 'self' data:; "
    "object-src 'none'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "microphone=(self)",
    "cache-control": "no-cache",
}


@router.get("/")
async def page() -> Response:
    """The studio."""
    return FileResponse(FOLDER / "index.html", headers=HEADERS, media_type="text/html")


def _serving(name: str) -> Callable[[], Coroutine[None, None, Response]]:
    async def serve() -> Response:
        return FileResponse(FOLDER / name, headers=HEADERS, media_type=TYPES[name])

    return serve


for _name in TYPES:
    router.add_api_route(f"/studio/{_name}", _serving(_name), name=_name)
