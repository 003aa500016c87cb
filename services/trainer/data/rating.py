"""A small local page where a person listens to candidates and rates them, blind and shuffled.

Ratings are appended to a JSONL file as they are given, so the page can be closed at any time. The page listens on
127.0.0.1 only and knows nothing about who made a candidate.
"""

from __future__ import annotations

import html
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.trainer.data.preferences import Rating, read_ratings
from services.trainer.data.records import bad_line, checked, records
from services.trainer.data.rows import reason
from shared.errors import UserError

SCALE = range(1, 6)
ASPECTS = ("correctness", "prosody", "naturalness")
HOST = "127.0.0.1"


class Item(BaseModel):
    """One candidate to be rated: what was asked, the words, and where source and candidate lie."""

    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True)

    candidate: str = Field(min_length=1)
    instruction: str
    text: str
    source: Path
    audio: Path


def read_items(path: Path) -> list[Item]:
    """The items of a JSONL or CSV file, whose paths are relative to it. Raises UserError naming the bad line."""
    found: dict[str, Item] = {}
    for number, line in records(path):
        item = checked(Item, line, path, number)
        placed = item.model_copy(update={"source": path.parent / item.source, "audio": path.parent / item.audio})
        for file in (placed.source, placed.audio):
            if not file.is_file():
                raise bad_line(path, number, f"there is no recording {file}")
        if item.candidate in found:
            raise bad_line(path, number, f"the candidate {item.candidate!r} stands there twice")
        found[item.candidate] = placed
    if not found:
        raise UserError(f"{path} holds nothing to rate.", code="invalid_dataset")
    return list(found.values())


def shuffled(items: Sequence[Item], rater: str) -> list[Item]:
    """The items in an order of the rater's own, always the same for one rater."""
    seed = int.from_bytes(rater.encode()[:8].ljust(8, b"\0"), "little")
    return [items[k] for k in np.random.default_rng(seed).permutation(len(items))]


class RatingServer:
    """Serves the page for one rater. `next_item` is the first in the rater's order that has no rating yet."""

    def __init__(self, items: Sequence[Item], rater: str, target: Path, port: int = 0) -> None:
        self.items, self.rater, self.target = shuffled(items, rater), rater, target
        self._lock = threading.Lock()
        target.parent.mkdir(parents=True, exist_ok=True)
        known = read_ratings(target) if target.exists() else []
        self._rated = {one.candidate for one in known if one.rater == rater}
        try:
            self._server = ThreadingHTTPServer((HOST, port), _handler(self))
        except (OSError, OverflowError) as error:
            raise UserError(f"The page cannot be opened at port {port}: {error}.", "--port 0 takes a free one."
                            ) from error  # fmt: skip

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._server.server_port}/"

    def next_item(self) -> tuple[int, Item] | None:
        """Place and item to be rated next, None when all are."""
        todo = (pair for pair in enumerate(self.items) if pair[1].candidate not in self._rated)
        return next(todo, None)

    def rate(self, place: int, values: dict[str, str]) -> None:
        """Append a rating. Raises ValueError for values that are none."""
        rating = Rating(
            candidate=self.items[place].candidate, rater=self.rater, scale=5, **{k: float(values[k]) for k in ASPECTS}
        )
        if not all(getattr(rating, aspect) in SCALE for aspect in ASPECTS):
            raise ValueError("ratings go from 1 to 5")
        with self._lock, self.target.open("a", encoding="utf-8") as file:
            file.write(rating.model_dump_json(exclude_none=True) + "\n")
            self._rated.add(rating.candidate)

    def page(self) -> str:
        """The page for the next item."""
        found = self.next_item()
        done = f"<p>{len(self._rated)} of {len(self.items)} rated.</p>"
        if found is None:
            return _PAGE.format(body=f"{done}<p>All done, thank you.</p>")
        place, item = found
        rows = "".join(
            f"<fieldset><legend>{aspect}</legend>"
            + "".join(f'<label><input type="radio" name="{aspect}" value="{k}" required> {k}</label> ' for k in SCALE)
            + "</fieldset>" for aspect in ASPECTS
        )  # fmt: skip
        body = (
            f"{done}<p><b>{html.escape(item.instruction)}</b></p><p>{html.escape(item.text)}</p>"
            f'<p>Before <audio controls src="/audio/{place}/source"></audio></p>'
            f'<p>After <audio controls autoplay src="/audio/{place}/audio"></audio></p>'
            f'<form method="post" action="/rate/{place}">{rows}<button>Next</button></form>'
        )
        return _PAGE.format(body=body)

    def serve(self) -> None:
        """Answer until `close`."""
        self._server.serve_forever(poll_interval=0.1)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


_PAGE = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><title>Rate recordings</title>'
    "<style>body{{font:16px system-ui;max-width:40rem;margin:2rem auto}}fieldset{{border:0;padding:.4rem 0}}"
    "audio{{vertical-align:middle}}</style><body>{body}</body></html>"
)


def _handler(owner: RatingServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Three addresses: the page, the audio of a place, and a rating of a place."""

        def do_GET(self) -> None:
            parts = urlsplit(self.path).path.strip("/").split("/")
            if parts == [""]:
                self._answer(200, owner.page().encode(), "text/html; charset=utf-8")
            elif len(parts) == 3 and parts[0] == "audio" and self._place(parts[1]) is not None:
                item = owner.items[int(parts[1])]
                self._answer(200, (item.source if parts[2] == "source" else item.audio).read_bytes(), "audio/wav")
            else:
                self._answer(404, b"no such page", "text/plain")

        def do_POST(self) -> None:
            parts = urlsplit(self.path).path.strip("/").split("/")
            length = min(int(self.headers.get("Content-Length", "0")), 4096)
            values = {k: v[0] for k, v in parse_qs(self.rfile.read(length).decode(errors="replace")).items()}
            place = self._place(parts[-1])
            try:
                if parts[0] != "rate" or place is None:
                    raise ValueError("no such item")
                owner.rate(place, values)
            except (ValueError, KeyError, ValidationError) as error:
                self._answer(400, reason(error).encode(), "text/plain")
                return
            self.send_response(303)
            self.send_header("Location", "/")
            self.end_headers()

        def _place(self, text: str) -> int | None:
            return int(text) if text.isdecimal() and int(text) < len(owner.items) else None

        def _answer(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not logged."""

    return Handler
