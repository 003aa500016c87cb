"""Load the language model and its text tokenizer from a checkpoint in the published layout.

Sizes come from the checkpoint's own config.json. Knows nothing about how the model is run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from shared.checkpoints.layout import Checkpoint, InvalidCheckpoint, read_json
from shared.checkpoints.unfilled import unfilled
from shared.checkpoints.weights import default_dtype, read_headers
from shared.models.quantize import HalfLinear, Int8Linear, quantize_weight
from shared.models.step1 import Step1, Step1Config
from shared.prompts import TextTokenizer

Quantize = Literal["int8", "half"] | None


def load_config(checkpoint: Checkpoint) -> Step1Config:
    """Sizes of the language model. Raises InvalidCheckpoint naming what config.json lacks."""
    path = checkpoint.step1_dir / "config.json"
    try:
        return Step1Config.from_dict(read_json(path))
    except ValueError as error:
        raise InvalidCheckpoint(f"{path}: {error}", "Fetch the file again.") from error


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    rest = f" and {len(ordered) - 4} more" if len(ordered) > 4 else ""
    return ", ".join(ordered[:4]) + rest


def _check_headers(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Compare names and shapes in the weight files with the model's, before any number is read."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: head.shape for path in checkpoint.step1_files for name, head in read_headers(path).items()}
    where = f"the language model in {checkpoint.step1_dir}"
    packed = [name for name in found if name.endswith(("weight_packed", "weight_scale", ".qweight"))]
    if packed:
        raise InvalidCheckpoint(f"{where} is a quantised release ({packed[0]}).",
                                'Use the bf16 release; quantize="int8" shrinks it on loading.')  # fmt: skip
    hint = "config.json and the weights must come from the same release."
    if missing := expected.keys() - found.keys():
        raise InvalidCheckpoint(f"{where} lacks {len(missing)} tensors: {_listed(missing)}.", hint)
    if unknown := found.keys() - expected.keys():
        raise InvalidCheckpoint(f"{where} has {len(unknown)} unknown tensors: {_listed(unknown)}.", hint)
    for name, shape in expected.items():
        if found[name] != shape:
            raise InvalidCheckpoint(f"{where}: {name} is {found[name]}, config.json makes it {shape}.", hint)


def _place(model: Step1, name: str, tensor: Tensor, quantize: Quantize) -> None:
    """Put one tensor into the (meta) model, made smaller if asked and if it is a matrix of a linear layer."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if quantize and isinstance(owner, nn.Linear):
        parent_name, _, child = owner_name.rpartition(".")
        smaller = Int8Linear(*quantize_weight(tensor)) if quantize == "int8" else HalfLinear(tensor)
        setattr(model.get_submodule(parent_name), child, smaller)
    else:
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=quantize is None))


def load_step1(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantize: Quantize = None,
    needs_head: bool = True,
) -> Step1:
    """The language model with its weights, in eval mode. Without `needs_head` its lm_head may be missing: it passes
    hidden states on then.

    `dtype` None takes `default_dtype(device)`; "half" is for float32 on a CPU (`HalfLinear`). Tensors are converted
    (and quantised) one by one, so the peak is the finished model and one tensor. Raises MissingComponent or
    InvalidCheckpoint naming file and tensor.
    """
    chosen = dtype or default_dtype(device)
    with unfilled():
        model = Step1(load_config(checkpoint))
    if not needs_head and not any("lm_head.weight" in read_headers(path) for path in checkpoint.step1_files):
        model.lm_head = nn.Identity()
    _check_headers(checkpoint, model)
    for path in checkpoint.step1_files:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():  # noqa: SIM118
                _place(model, name, file.get_tensor(name).to(chosen), quantize)
    if quantize == "half":
        model.join()
    return model.eval()


def load_text_tokenizer(checkpoint: Checkpoint) -> TextTokenizer:
    """The checkpoint's text tokenizer. Raises MissingComponent when the file is missing or unreadable."""
    return TextTokenizer.from_file(checkpoint.text_tokenizer_file)
