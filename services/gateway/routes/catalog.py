"""/v1/models and /v1/edits/options: what can be asked for."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from services.gateway.dependencies import Caller, GatewayOf
from services.gateway.problems import responses
from services.gateway.threads import blocking
from shared.checkpoints.layout import Metadata
from shared.tags import TAGS

router = APIRouter(prefix="/v1", tags=["catalog"])
COMPONENTS = ("tokenizer", "llm", "decoder", "reward")
EDITS = {
    "emotion": "Give the voice an emotion, or take it away.",
    "style": "Give the voice a speaking style, or take it away.",
    "speed": "Say it faster or slower.",
    "paralinguistic": "Put sounds such as [Laughter] between the words: target_text is the text with them.",
    "denoise": "Remove noise.",
    "vad": "Cut silence out.",
    "clone": "Say target_text with the recording's voice.",
}


class Model(BaseModel):
    """A checkpoint that answers."""

    id: str
    object: Literal["model"] = "model"
    owned_by: Literal["editx"] = "editx"
    version: str
    components: dict[str, bool] = Field(description="Whether each part would answer now.")


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Tag(BaseModel):
    """One tag."""

    name: str
    meaning: str
    trained: bool = Field(description="Whether the checkpoint has learned it.")


class EditOption(BaseModel):
    """One type of edit and the tags it takes."""

    type: str
    meaning: str
    trained: bool
    takes: list[str] = Field(description="The fields it needs besides the recording.")
    tags: list[Tag]


class Options(BaseModel):
    """Everything that an edit may ask for."""

    object: Literal["edit.options"] = "edit.options"
    model: str
    edits: list[EditOption]
    formats: list[str]
    languages: list[Tag] = Field(description="Tags that may begin a text to say it in that language.")


@router.get("/models", responses=responses(401, 503))
async def list_models(gateway: GatewayOf, principal: Caller) -> ModelList:
    """The models that answer here."""
    metadata, inference = gateway.backend.metadata, gateway.backend.inference
    ready = {name: await blocking(inference.ready, name) for name in COMPONENTS}
    return ModelList(data=[Model(id=metadata.name, version=metadata.version, components=ready)])


@router.get("/edits/options", responses=responses(401))
async def list_options(gateway: GatewayOf, principal: Caller) -> Options:
    """The types of edit, their tags and what each means."""
    metadata = gateway.backend.metadata
    takes = {"clone": ["target_text", "text"], "paralinguistic": ["target_text", "text"], "denoise": [], "vad": []}
    edits = [
        EditOption(
            type=name,
            meaning=meaning,
            trained=metadata.knows(name),
            takes=takes.get(name, ["detail", "text"]),
            tags=_tags(metadata, name),
        )
        for name, meaning in EDITS.items()
    ]
    languages = [Tag(name=name, meaning=meaning, trained=True) for name, meaning in TAGS["language"].items()]
    return Options(model=metadata.name, edits=edits, formats=["wav", "flac", "mp3", "opus"], languages=languages)


def _tags(metadata: Metadata, kind: str) -> list[Tag]:
    known = TAGS.get(kind, {})
    return [Tag(name=name, meaning=meaning, trained=metadata.knows(kind, name)) for name, meaning in known.items()]
