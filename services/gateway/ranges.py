"""Whole answers, parts of them and none: byte ranges and entity tags of HTTP (RFC 9110, sections 13 and 14).

Players seek by asking for a part, and some play nothing without. Knows nothing about jobs or stores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from fastapi import Response

_ONE_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def part_of(size: int, asked: str) -> range | None:
    """The bytes that a Range header asks for of so many; empty where it lies outside.

    None for several ranges, other units and what is no range, which a server may answer as if nothing was asked.
    """
    match = _ONE_RANGE.fullmatch(asked.strip())
    if match is None or not any(match.groups()):
        return None
    first, last = match.groups()
    if not first:
        return range(max(0, size - int(last)), size)
    if last and int(last) < int(first):
        return None
    return range(min(int(first), size), min(int(last) + 1, size) if last else size)


def answer(data: bytes, media_type: str, headers: Mapping[str, str], asked: Mapping[str, str]) -> Response:
    """200 with all of the data, 206 with the part that `asked` (a request's headers) wants, 304 where it has the entity
    already, 416 for a part that is not there. `headers` may have an etag."""
    etag, sent = headers.get("etag"), {**headers, "accept-ranges": "bytes"}
    known = [tag.strip().removeprefix("W/") for tag in asked.get("if-none-match", "").split(",")]
    if etag is not None and (etag in known or "*" in known):
        return Response(status_code=304, headers=sent)
    part = part_of(len(data), asked["range"]) if "range" in asked else None
    if part is None or asked.get("if-range", etag) != etag:
        return Response(data, 200, sent, media_type)
    if not part:
        return Response(status_code=416, headers={**sent, "content-range": f"bytes */{len(data)}"})
    sent["content-range"] = f"bytes {part.start}-{part.stop - 1}/{len(data)}"
    return Response(data[part.start : part.stop], 206, sent, media_type)
