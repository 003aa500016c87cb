"""The model repository: every service's model, as a model server wants it."""

from __future__ import annotations

from pathlib import Path

from editx.stack.servers import ROOT
from services.decoder.serving import SPEC as DECODER
from services.llm.serving import SPEC as LLM
from services.reward.serving import SPEC as REWARD
from services.tokenizer.serving import SPEC as TOKENIZER
from shared.inference.repository import ModelSpec, write

SPECS: dict[str, ModelSpec] = {"tokenizer": TOKENIZER, "llm": LLM, "decoder": DECODER, "reward": REWARD}
"""Service to its model."""


def repository(service: str) -> Path:
    """The folder of a service's models: what `tritonserver --model-repository` takes."""
    return ROOT / "services" / service / "triton"


def write_configurations() -> list[Path]:
    """Write the configurations of all services again; the files."""
    return [path for service, spec in SPECS.items() for path in write(spec, repository(service))]
