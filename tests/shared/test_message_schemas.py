"""The documented message schemas are those of the code, and their examples hold."""

import json
from pathlib import Path

import pytest

from shared.schemas.documents import MESSAGES, schema_text
from shared.schemas.exchange import Submission

FOLDER = Path(__file__).parents[2] / "docs/messages"


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_the_documented_schema_is_up_to_date(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text(encoding="utf-8") == schema_text(name)


def test_the_examples_of_the_submission_are_submissions() -> None:
    schema = json.loads((FOLDER / "submission.json").read_text(encoding="utf-8"))
    for example in schema["examples"]:
        Submission.model_validate(example)
