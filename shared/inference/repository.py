"""Model repositories for Triton: every configuration, for CPU and GPU, is written from one description of the model.

A service keeps the description beside its worker and the written files in triton/MODEL: config.pbtxt (CPU), configs/
gpu.pbtxt (chosen by `tritonserver --model-config-name=gpu`) and 1/model.py. Knows no service.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shared.inference.wire import DEVICE, PRIORITY_LEVELS, SCALARS

Form = Literal["cpu", "gpu"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """One input or output: Triton's type ("FP32") and its shape without the batch axis; () is a number."""

    type: str
    shape: Shape


@dataclass(frozen=True)
class ModelSpec:
    """What the server must know of a model.

    `max_batch` requests of any lengths share a batch, waiting `delay_us` for each other; `queue` more may wait.
    Inputs named in `optional` may be absent. A `streams` model may give many answers to a request. `instances` is per
    device.
    """

    name: str
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    optional: tuple[str, ...] = ()
    streams: bool = False
    max_batch: Mapping[Form, int] = field(default_factory=lambda: {"cpu": 8, "gpu": 16})
    delay_us: int = 5_000
    queue: int = 256
    instances: int = 1


def render(spec: ModelSpec, form: Form) -> str:
    """The text of config.pbtxt."""
    kind = "KIND_CPU" if form == "cpu" else "KIND_GPU"
    scalars = ",".join(name for name, tensor in spec.outputs.items() if not tensor.shape)
    blocks = [
        f"# Written by `editx models write` from the service's serving.py ({form} form). Change it there.",
        f'name: "{spec.name}"',
        'backend: "python"',
        f"max_batch_size: {spec.max_batch[form]}",
        f"model_transaction_policy {{ decoupled: {str(spec.streams).lower()} }}",
        *(_tensor("input", name, tensor, name in spec.optional) for name, tensor in spec.inputs.items()),
        *(_tensor("output", name, tensor) for name, tensor in spec.outputs.items()),
        f"instance_group [ {{ count: {spec.instances} kind: {kind} }} ]",
        "dynamic_batching {\n"
        f"  max_queue_delay_microseconds: {spec.delay_us}\n"
        f"  priority_levels: {PRIORITY_LEVELS}\n"
        f"  default_priority_level: {PRIORITY_LEVELS}\n"
        "  default_queue_policy {\n"
        "    timeout_action: REJECT\n"
        "    allow_timeout_override: true\n"
        f"    max_queue_size: {spec.queue}\n"
        "  }\n"
        "}",
        f'parameters {{ key: "{SCALARS}" value {{ string_value: "{scalars}" }} }}',
        f'parameters {{ key: "{DEVICE}" value {{ string_value: "{"cpu" if form == "cpu" else "cuda"}" }} }}',
    ]
    return "\n".join(blocks) + "\n"


def write(spec: ModelSpec, folder: Path) -> list[Path]:
    """Write both configurations below `folder`/NAME; the files."""
    files = {folder / spec.name / "config.pbtxt": "cpu", folder / spec.name / "configs/gpu.pbtxt": "gpu"}
    for path, form in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(spec, "cpu" if form == "cpu" else "gpu"))
    return list(files)


def _tensor(side: Literal["input", "output"], name: str, tensor: Tensor, optional: bool = False) -> str:
    dims = ", ".join(map(str, tensor.shape or (1,)))
    ragged = " allow_ragged_batch: true" if side == "input" and -1 in tensor.shape else ""
    may_lack = " optional: true" if optional else ""
    return f'{side} [ {{ name: "{name}" data_type: TYPE_{tensor.type} dims: [ {dims} ]{ragged}{may_lack} }} ]'
