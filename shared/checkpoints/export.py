"""Trained tokenizers to files of the published layout (what the loaders of this package, and the official code, read).

The only module of `shared` that needs the `onnx` package, and only while a function runs.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from shared.checkpoints.tokenizer import BATCHED
from shared.errors import MissingComponent
from shared.models.linguistic import LinguisticEncoder
from shared.models.semantic import SemanticEncoder, WhisperSemanticEncoder
from shared.models.speaker import SpeakerEncoder

OPSET = 17
SMALL = 1024
"""Tensors of fewer numbers stay in float32: there is nothing to save."""


Stored = Literal["float32", "float16", "int8"]
"""How a file keeps large weights; they are computed with in float32 all the same. int8 has a scale for each output of a
matrix or convolution, and float16 for what is neither."""


def export_semantic_onnx(
    encoder: SemanticEncoder | WhisperSemanticEncoder, target: Path, *, stored: Stored = "float32"
) -> None:
    """Writes `speech_tokenizer_v1.onnx`: feats (batch, bins, T) float32, feats_length int32 (batch,) -> indices int32.

    The published file takes batch 1 only; this one takes any, with indices past a row's length meaning nothing.
    Raises MissingComponent without the onnx package.
    """
    feats, lengths = torch.randn(2, encoder.config.bins, 403), torch.tensor([403, 201], dtype=torch.int32)
    axes = {"feats": {0: "batch", 2: "frames"}, "feats_length": {0: "batch"}, "indices": {0: "batch", 1: "codes"}}
    _export(encoder, (feats, lengths), target, ["feats", "feats_length"], ["indices"], axes, stored)


def export_speaker_onnx(encoder: SpeakerEncoder, target: Path) -> None:
    """Writes `campplus.onnx`: input (batch, T, bins) float32 -> output (batch, embedding).

    Raises MissingComponent without the onnx package.
    """
    features = torch.randn(2, 203, encoder.config.bins)
    axes = {"input": {0: "batch", 1: "frames"}, "output": {0: "batch"}}
    _export(encoder, (features,), target, ["input"], ["output"], axes)


def save_linguistic(encoder: LinguisticEncoder, cmvn: Tensor, centroids: Tensor, folder: Path,
                    centroids_file: Path, *, is_half: bool = False) -> None:  # fmt: skip
    """Writes the FunASR folder (config.yaml, am.mvn, model.safetensors) and the centroids (K, D) as .npy.

    cmvn (2, input) is what features get added and are then multiplied by. `is_half` stores the encoder as float16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = encoder.config
    document = {
        "encoder": "SANMEncoderChunkOpt",
        "encoder_conf": {
            "output_size": config.output_size, "attention_heads": config.attention_heads,
            "linear_units": config.linear_units, "num_blocks": config.num_blocks, "kernel_size": config.kernel_size,
            "dropout_rate": config.dropout_rate, "sanm_shfit": 0, "normalize_before": True, "input_layer": "pe_online",
            "selfattention_layer_type": "sanm",
        },
        "frontend": "WavFrontendOnline",
        "frontend_conf": {"fs": 16000, "window": "hamming", "n_mels": config.input_size // 7, "frame_length": 25,
                          "frame_shift": 10, "lfr_m": 7, "lfr_n": 6, "dither": 0.0},
        "model": "ParaformerStreaming",
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    (folder / "am.mvn").write_text(_kaldi_nnet(cmvn), encoding="utf-8")
    dtype = torch.float16 if is_half else torch.float32
    state = {f"encoder.{name}": tensor.detach().cpu().to(dtype).contiguous() for name, tensor in
             encoder.state_dict().items()}  # fmt: skip
    save_file(state, folder / "model.safetensors")
    table: npt.NDArray[np.float32] = centroids.detach().cpu().float().numpy()
    np.save(centroids_file, table)


def _kaldi_nnet(cmvn: Tensor) -> str:
    size = cmvn.shape[1]
    shift, scale = (" ".join(f"{value:.9g}" for value in row.tolist()) for row in cmvn)
    return (
        f"<Nnet> \n<Splice> {size} {size} \n[ 0 ]\n<AddShift> {size} {size} \n<LearnRateCoef> 0 [ {shift} ]\n"
        f"<Rescale> {size} {size} \n<LearnRateCoef> 0 [ {scale} ]\n</Nnet> \n"
    )


def _export(module: nn.Module, inputs: tuple[Tensor, ...], target: Path, names: list[str], outputs: list[str],
            axes: dict[str, dict[int, str]], stored: Stored = "float32") -> None:  # fmt: skip
    onnx = _onnx()
    target.parent.mkdir(parents=True, exist_ok=True)
    was_training = module.training
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter announces its successor, which needs another package
        torch.onnx.export(module.eval(), inputs, target, input_names=names, output_names=outputs, dynamic_axes=axes,
                          opset_version=OPSET, dynamo=False)  # fmt: skip
    module.train(was_training)
    model = onnx.load(target)
    onnx.helper.set_model_props(model, {BATCHED: "true"})
    if stored != "float32":
        _pack(onnx, model.graph, stored)
    onnx.save(model, target)


def _pack(onnx: ModuleType, graph: Any, stored: Stored) -> None:
    """Store the large weights of a graph in fewer bytes, each with the nodes that make it float32 again, which the
    runtime folds when it loads."""
    outputs = {node.input[1]: {"MatMul": -1, "Conv": 0}.get(node.op_type) for node in graph.node if len(node.input) > 1}
    made, scales = [], []
    for tensor in graph.initializer:
        array, name = onnx.numpy_helper.to_array(tensor), tensor.name
        if array.dtype != np.float32 or array.size < SMALL:
            continue
        axis = outputs.get(name) if stored == "int8" else None
        packed, whole = f"{name}.{stored}", name if axis is None else f"{name}.whole"
        if axis is None:
            small = array.astype(np.float16)
        else:
            others = tuple(one for one in range(array.ndim) if one != axis % array.ndim)
            scale = np.maximum(np.abs(array).max(others, keepdims=True), 1e-12) / 127
            small = np.rint(array / scale).astype(np.int8)
            scales.append(onnx.numpy_helper.from_array(scale.astype(np.float32), f"{name}.scale"))
        tensor.CopyFrom(onnx.numpy_helper.from_array(small, packed))
        made.append(onnx.helper.make_node("Cast", [packed], [whole], to=onnx.TensorProto.FLOAT))
        if axis is not None:
            made.append(onnx.helper.make_node("Mul", [whole, f"{name}.scale"], [name]))
    graph.initializer.extend(scales)
    nodes = [*made, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _onnx() -> ModuleType:
    try:
        import onnx
    except ImportError as error:
        raise MissingComponent("The package onnx", "it is not installed", "Install editx[train].") from error
    return onnx
