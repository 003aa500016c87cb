"""The OpenAPI document holds: requests made up from it are answered as it says, and never with a server error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from services.gateway.schemas import EditBody, SpeechBody, VoiceBody
from tests.fixtures.gateways import Served, serving

EXAMPLES = 12
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def roomy(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    settings = {"requests_per_minute": 100_000, "open_jobs_max": 10_000, "wait_max_s": 0.5}
    with serving(tiny, tmp_path_factory.mktemp("roomy"), **settings) as found:
        yield found


def test_made_up_requests_are_answered_as_the_document_says(roomy: Served) -> None:
    document = schemathesis.openapi.from_url(f"{roomy.url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) >= 20
    for operation in operations:

        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def conforms(case: Any) -> None:
            case.call_and_validate(checks=CHECKS, timeout=10)

        conforms()


def test_every_operation_is_described_and_tagged(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert len(operations) >= 20
    for operation in operations:
        assert operation["description"], operation["operationId"]
        assert operation["tags"], operation["operationId"]


def test_every_reference_of_the_document_leads_somewhere(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(_references(document)) <= known


def test_the_examples_are_valid_requests(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    bodies = {"/v1/audio/edits": EditBody, "/v1/audio/voices": VoiceBody}
    for path, model in bodies.items():
        model.model_validate(paths[path]["post"]["requestBody"]["content"]["application/json"]["example"])
    SpeechBody.model_validate(SpeechBody.model_json_schema()["examples"][0])


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)
