"""Weight files, safetensors or PyTorch: their tensors, or only names, shapes and types. Code in a pickle is never run.

Knows nothing about which model the weights belong to.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shared.checkpoints.layout import InvalidCheckpoint

WRAPPERS = ("state_dict", "model_state_dict", "model", "generator")  # the last in what NVIDIA published


def default_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 where it is fast (GPUs, CPUs with its instructions), else float32."""
    fast = torch.device(device).type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


@dataclass(frozen=True)
class TensorHeader:
    """What is known of a tensor without reading its numbers; `dtype` in torch's short form such as `bfloat16`."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> TensorHeader:
        """The header of a tensor, on the meta device too."""
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def meta(self) -> Tensor:
        """A tensor like it, without memory."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype), device="meta")

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


_SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """Names, shapes and types of a weight file's tensors; no numbers are read.

    Raises InvalidCheckpoint for a file that is truncated, corrupt, not a weight file, or a pickle that holds code.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="numpy") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                return {
                    name: TensorHeader(tuple(part.get_shape()), _SAFETENSORS_DTYPES[part.get_dtype()])
                    for name, part in slices.items()
                }
        except (SafetensorError, OSError, KeyError) as error:
            raise _broken(path, error) from error
    return {name: TensorHeader.of(tensor) for name, tensor in _unpickle(path, "meta").items()}


def read_weights(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """All tensors of a weight file. Raises InvalidCheckpoint as `read_headers` does."""
    if path.suffix != ".safetensors":
        return _unpickle(path, device)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _broken(path, error) from error


def _unpickle(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location=device, mmap=zipfile.is_zipfile(path), weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code is None:
            raise _broken(path, ValueError("it is not a file of tensors")) from error
        raise InvalidCheckpoint(
            f"{path} holds code ({code[1]}) where only tensors belong. It was not run.",
            "Fetch the file again from a source you trust.",
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, struct.error) as error:
        raise _broken(path, error) from error
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise InvalidCheckpoint(f"{path} holds a {type(content).__name__}, not tensors by name.", "Fetch it again.")
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _broken(path: Path, error: Exception) -> InvalidCheckpoint:
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            return InvalidCheckpoint(f"{path} is a Git LFS pointer, not the file itself.", "Run `git lfs pull` there.")
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return InvalidCheckpoint(f"{path} cannot be read: {reason}.", "It is truncated or damaged: fetch it again.")
