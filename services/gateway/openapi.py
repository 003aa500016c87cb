"""The OpenAPI document: bodies that come as JSON or as a form, and problem documents as every error's answer."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, JsonValue

from services.gateway.problems import Problem

REF = "#/components/schemas/{model}"
NESTED = ("generate", "decode")


def body(model: type[BaseModel], example: dict[str, JsonValue], *parts: str) -> dict[str, Any]:
    """The request body of a route that reads it itself: the model as JSON, and as a form with the files in `parts`."""
    schema = model.model_json_schema(ref_template=REF)
    schema.pop("$defs", None)
    fields = {name: _field(of) for name, of in schema["properties"].items() if name not in (*NESTED, *parts)}
    files = {name: {"type": "string", "format": "binary"} for name in parts}
    form = {
        "type": "object",
        "properties": fields | files,
        "required": schema["required"],
        "additionalProperties": False,
    }
    content = {
        "multipart/form-data": {"schema": form},
        "application/json": {"schema": schema, "example": example},
    }
    return {"requestBody": {"required": True, "content": content}}


def install(app: FastAPI) -> None:
    """Have the application describe its problem documents once, under components."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        document = plain()
        schemas = document["components"]["schemas"]
        schemas["Problem"] = Problem.model_json_schema(ref_template=REF)
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        return document

    app.openapi = described  # type: ignore[method-assign]


def _field(of: dict[str, Any]) -> dict[str, Any]:
    """A property as a form carries it: text, with the meaning and the choices that the model gives."""
    choices = {"enum": of["enum"]} if "enum" in of else {}
    meaning = {"description": of["description"]} if "description" in of else {}
    return {"type": "string", **choices, **meaning}
