"""Server-sent events from lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


class Parser:
    """Feed it lines without their ends; it gives (event, data) at each blank line that ends one."""

    def __init__(self) -> None:
        self._event = ""
        self._data: list[str] = []

    def feed(self, line: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """At most one event."""
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "event":
                self._event = value
            elif name == "data":
                self._data.append(value)
            return
        event, data, self._event, self._data = self._event, self._data, "", []
        if data:
            yield event, json.loads("\n".join(data))
