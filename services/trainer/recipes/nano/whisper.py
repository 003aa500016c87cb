"""Whisper-base's encoder in torch, read from the CTranslate2 file that the packages carry: the teacher of both
tokenizers.

Knows nothing about datasets. The model: Radford et al., arXiv 2212.04356, MIT.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from services.trainer.recipes.nano import assets

_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
ENCODER_FILE = "whisper-encoder.npz"
HIDDEN = 512
HEADS = 8
LAYERS = 6


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """All variables of a CTranslate2 model.bin by name."""
    data = memoryview(path.read_bytes())
    position = 0

    def take(code: str) -> int:
        nonlocal position
        value = struct.unpack_from("<" + code, data, position)[0]
        position += struct.calcsize("<" + code)
        return int(value)

    def text() -> str:
        nonlocal position
        length = take("H")
        value = bytes(data[position : position + length - 1]).decode()
        position += length
        return value

    take("I"), text(), take("I")  # file version, specification, revision
    variables = {}
    for _ in range(take("I")):
        name = text()
        shape = [take("I") for _ in range(take("B"))]
        dtype, size = _DTYPES[take("B")], take("I")
        variables[name] = np.frombuffer(data[position : position + size], dtype).reshape(shape)
        position += size
    return variables


class WhisperEncoder:
    """Log mel (B, 80, T at 100 Hz) to hidden states at 50 Hz, unpadded windows of up to 30 s."""

    def __init__(self, variables: dict[str, np.ndarray], device: str, dtype: torch.dtype) -> None:
        self._weights = {
            name.removeprefix("encoder/"): torch.from_numpy(np.array(value, np.float32)).to(device, dtype)
            for name, value in variables.items()
            if name.startswith("encoder/") and value.ndim
        }
        self.device, self.dtype = device, dtype

    @classmethod
    def of_assets(cls, device: str, dtype: torch.dtype) -> WhisperEncoder:
        """The encoder alone, if a bundle brought it, else the one of the fetched package."""
        alone = assets.data_dir() / ENCODER_FILE
        if alone.exists():
            return cls(dict(np.load(alone)), device, dtype)
        return cls(read_ctranslate2(assets.prepare().whisper / "model.bin"), device, dtype)

    def first_layers(self, layers: int) -> dict[str, Tensor]:
        """Convolutions and the first layers under the names of `shared.models.semantic.WhisperTrunk`."""
        w = self._weights
        state = {f"{name}.{part}": w[f"{name}/{part}"] for name in ("conv1", "conv2") for part in ("weight", "bias")}
        for layer in range(layers):
            theirs, ours = f"layer_{layer}/", f"blocks.{layer}."
            joined, biases = (w[f"{theirs}self_attention/linear_0/{part}"].chunk(3) for part in ("weight", "bias"))
            for name, weight, bias in zip(("query", "key", "value"), joined, biases, strict=True):
                state[f"{ours}attn.{name}.weight"] = weight
                if name != "key":  # whose bias changes no attention
                    state[f"{ours}attn.{name}.bias"] = bias
            for name, found in (
                ("attn.out", "self_attention/linear_1"), ("mlp.0", "ffn/linear_0"), ("mlp.2", "ffn/linear_1"),
            ):  # fmt: skip
                state |= {f"{ours}{name}.{part}": w[f"{theirs}{found}/{part}"] for part in ("weight", "bias")}
            for name, found in (("attn_ln", "self_attention/layer_norm"), ("mlp_ln", "ffn/layer_norm")):
                state[f"{ours}{name}.weight"] = w[f"{theirs}{found}/gamma"]
                state[f"{ours}{name}.bias"] = w[f"{theirs}{found}/beta"]
        return state

    @torch.inference_mode()
    def __call__(self, mel: Tensor, middle: int = 3) -> tuple[Tensor, Tensor]:
        """The states after layer `middle` and after the last norm, both (B, T // 2, 512)."""
        return self.states(mel, middle)

    def states(self, mel: Tensor, middle: int = 3) -> tuple[Tensor, Tensor]:
        """The same with gradients to the mel; the weights have none."""
        w = self._weights
        x = F.gelu(F.conv1d(mel.to(self.device, self.dtype), w["conv1/weight"], w["conv1/bias"], padding=1))
        x = F.gelu(F.conv1d(x, w["conv2/weight"], w["conv2/bias"], stride=2, padding=1)).transpose(1, 2)
        x = x + w["position_encodings/encodings"][: x.shape[1]]
        halfway = x
        for layer in range(LAYERS):
            x = self._layer(x, f"layer_{layer}/")
            if layer + 1 == middle:
                halfway = x
        return halfway, self._norm(x, "layer_norm/")

    def _norm(self, x: Tensor, prefix: str) -> Tensor:
        return F.layer_norm(x, (HIDDEN,), self._weights[prefix + "gamma"], self._weights[prefix + "beta"])

    def _linear(self, x: Tensor, prefix: str) -> Tensor:
        return F.linear(x, self._weights[prefix + "/weight"], self._weights[prefix + "/bias"])

    def _layer(self, x: Tensor, prefix: str) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self._linear(
            self._norm(x, prefix + "self_attention/layer_norm/"), prefix + "self_attention/linear_0"
        ).chunk(3, -1)
        q, k, v = (t.view(batch, length, HEADS, -1).transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self._linear(attended, prefix + "self_attention/linear_1")
        y = F.gelu(self._linear(self._norm(x, prefix + "ffn/layer_norm/"), prefix + "ffn/linear_0"))
        return x + self._linear(y, prefix + "ffn/linear_1")
