"""The model repository: every service's model, as a model server wants it."""

from __future__ import annotations

import shutil
from pathlib import Path

from editx.stack.servers import ROOT
from services.decoder.serving import SPEC as DECODER
from services.llm.serving import SPEC as LLM
from services.reward.serving import SPEC as REWARD
from services.tokenizer.serving import SPEC as TOKENIZER
from shared.inference.repository import ModelSpec, write
from shared.wiring import open_store

SPECS: dict[str, ModelSpec] = {"tokenizer": TOKENIZER, "llm": LLM, "decoder": DECODER, "reward": REWARD}
"""Service to its model."""
PREFIX = "models"
"""Where a bucket has its models."""


def repository(service: str) -> Path:
    """The folder of a service's models: what `tritonserver --model-repository` takes."""
    return ROOT / "services" / service / "triton"


def write_configurations() -> list[Path]:
    """Write the configurations of all services again; the files."""
    return [path for service, spec in SPECS.items() for path in write(spec, repository(service))]


def write_repository(target: str) -> list[str]:
    """Write one repository with the models of all services, for a server that shall serve them; the files' names.

    `target` is a folder, or a store's URL (s3://key:secret@host:port/bucket); a bucket has the models below models/.
    """
    files = {
        str(path.relative_to(repository(service))): path
        for service, spec in SPECS.items()
        for path in sorted((repository(service) / spec.name).rglob("*"))
        if path.suffix in (".pbtxt", ".py")
    }
    if "://" in target:
        store = open_store(target)
        for name, path in files.items():
            store.put(f"{PREFIX}/{name}", path.read_bytes())
        return [f"{PREFIX}/{name}" for name in files]
    for name, path in files.items():
        (Path(target) / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, Path(target) / name)
    return [str(Path(target) / name) for name in files]
