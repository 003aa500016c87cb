"""The JSON schemas of the messages that others write and read: `python -m shared.schemas.documents FOLDER` writes them.

Knows which messages are public.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic import BaseModel

from shared.schemas.exchange import Result, Submission
from shared.schemas.job import JobEvent
from shared.schemas.messages import BusMessage

MESSAGES: dict[str, type[BaseModel]] = {
    "submission": Submission, "result": Result, "step": BusMessage, "event": JobEvent,
}  # fmt: skip


def schema_text(name: str) -> str:
    """The JSON schema of a message, as it lies in docs/messages."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **MESSAGES[name].model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Write all schemas into the folder that the command line names."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in MESSAGES:
        (folder / f"{name}.json").write_text(schema_text(name), encoding="utf-8")


if __name__ == "__main__":
    main()
