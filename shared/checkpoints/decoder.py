"""The decoder's configuration and its two models, flow and vocoder, from a checkpoint in the published layout.

Sizes and the kind of vocoder (hift, bigvgan, spectral) come from cosyvoice.yaml. The tags of hyperpyyaml in that file
are kept as data and never acted upon. Knows nothing about how the models are run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import yaml
from torch import Tensor, nn

from shared.checkpoints.layout import MALFORMED, Checkpoint, InvalidCheckpoint, read_json
from shared.checkpoints.unfilled import unfilled
from shared.checkpoints.weights import read_weights
from shared.models.bigvgan import BigVGAN, BigVGANConfig
from shared.models.flow import Flow, FlowConfig
from shared.models.hift import HiFT, HiFTConfig
from shared.models.spectral import SpectralRows, SpectralVocoder
from shared.models.vocoder_stream import Vocoder
from shared.models.weight_norm import fold_weight_norm

TAG = "!"  # key under which the name of a tag is kept beside a mapping's own keys
VOCODERS = ("spectral", "bigvgan", "hift")
SAMPLES_PER_FRAME = 480
LISTED = 4
_REFETCH = "Configuration and weights must come from the same release: fetch both again."
Built = TypeVar("Built")


class _Reference(str):
    """The text of a `!ref <key>`."""


class _TagsAsData(yaml.SafeLoader):
    """Plain YAML, with application tags kept: `!new:x {a: 1}` becomes {"!": "new:x", "a": 1}."""


def _tagged(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> object:
    if isinstance(node, yaml.MappingNode):
        return {TAG: tag, **loader.construct_mapping(node, deep=True)}
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    text = str(node.value)
    return _Reference(text) if tag == "ref" else text or {TAG: tag}


_TagsAsData.add_multi_constructor("!", _tagged)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping with application tags as data and `!ref <a[b]>` replaced by what it points to.

    Raises InvalidCheckpoint naming the file for anything else, tags of Python objects included.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_TagsAsData)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidCheckpoint(f"{path} cannot be read: {' '.join(str(error).split())}.", "Fetch it again.") from error
    if not isinstance(document, dict):
        raise InvalidCheckpoint(f"{path} holds no settings.", "Fetch it again.")
    resolved: dict[str, Any] = _resolve(document, document, str(path))
    return resolved


def _resolve(value: Any, root: Mapping[str, Any], where: str, depth: int = 0) -> Any:
    if depth > 50:
        raise InvalidCheckpoint(f"{where}: its references lead in a circle.", "Fetch it again.")
    if isinstance(value, dict):
        return {key: _resolve(part, root, where, depth + 1) for key, part in value.items()}
    if isinstance(value, list):
        return [_resolve(part, root, where, depth + 1) for part in value]
    if not isinstance(value, _Reference) or not (match := re.fullmatch(r"<(\w+)((?:\[\w+\])*)>", value)):
        return value
    target: Any = root
    for key in (match[1], *re.findall(r"\[(\w+)\]", match[2])):
        if not isinstance(target, Mapping) or key not in target:
            raise InvalidCheckpoint(f"{where}: the reference {value} leads nowhere.", "Fetch it again.")
        target = target[key]
    return _resolve(target, root, where, depth + 1)


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """cosyvoice.yaml; for a folder with a BigVGAN generator alone, its config.json as the section `bigvgan`."""
    for folder in checkpoint.decoder_dirs:
        settings = folder / "config.json"
        if not (folder / "cosyvoice.yaml").is_file() and settings.is_file():
            section = read_json(settings)
            if "upsample_rates" in section:
                return {"bigvgan": section}
    return read_yaml(checkpoint.cosyvoice_yaml)


def vocoder_kind(config: Mapping[str, Any]) -> Literal["spectral", "bigvgan", "hift"] | None:
    """Which vocoder a configuration describes, by its section; a `hift` section may also hold a BigVGAN."""
    for kind in VOCODERS:
        section = config.get(kind)
        if isinstance(section, Mapping):
            is_bigvgan = "BigVGAN" in str(section.get(TAG)) or "upsample_initial_channel" in section
            return "bigvgan" if is_bigvgan else kind  # type: ignore[return-value]
    return None


def load_flow(
    checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Flow:
    """The flow in eval mode. Raises MissingComponent or InvalidCheckpoint naming file and tensors."""
    section = read_config(checkpoint).get("flow")
    if not isinstance(section, Mapping):
        raise InvalidCheckpoint(f"{checkpoint.cosyvoice_yaml} has no section 'flow'.", _REFETCH)
    with unfilled():
        flow = _configured(checkpoint, lambda: Flow(FlowConfig.from_dict(section)))
    path = checkpoint.flow_file
    state = {name: tensor.to(device, dtype, copy=True) for name, tensor in read_weights(path).items()}
    _fill(flow, state, path)
    return flow.eval()


def build_vocoder(checkpoint: Checkpoint) -> nn.Module:
    """The vocoder that the configuration describes, without its weights; weight norm is folded into plain weights.

    Raises InvalidCheckpoint where the configuration has none, or one whose frames are not 480 samples.
    """
    config = read_config(checkpoint)
    kind = vocoder_kind(config)
    if kind is None:
        raise InvalidCheckpoint(
            f"{checkpoint.cosyvoice_yaml} describes no vocoder.", f"It needs {', '.join(VOCODERS)}."
        )
    section = config[kind] if kind in config else config["hift"]
    model = _configured(checkpoint, lambda: _BUILD[kind](section))
    hop = _configured(checkpoint, lambda: model.hop if isinstance(model, HiFT | BigVGAN) else SAMPLES_PER_FRAME)
    if hop != SAMPLES_PER_FRAME:
        raise InvalidCheckpoint(
            f"The {kind} vocoder of {checkpoint.root} makes {hop} samples per mel frame.",
            f"The flow's mels need {SAMPLES_PER_FRAME}: choose a vocoder trained for them.",
        )
    return model


def load_vocoder(
    checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Vocoder:
    """The vocoder in eval mode. `dtype` is for its large parts: pitch, phase and transforms stay in float32.

    Weight norm is read under its old and new names and folded. Raises MissingComponent or InvalidCheckpoint.
    """
    model = build_vocoder(checkpoint)
    path = checkpoint.vocoder_file
    try:
        state = fold_weight_norm(read_weights(path))
    except KeyError as error:
        raise InvalidCheckpoint(f"{path} lacks the tensor {error.args[0]}.", _REFETCH) from error
    _fill(model, {name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}, path)
    model = model.eval().to(device)
    if isinstance(model, HiFT | BigVGAN):
        return model if dtype == torch.float32 else model.lower_precision(dtype)
    assert isinstance(model, SpectralVocoder)
    return SpectralRows(model)


def _bigvgan(section: Mapping[str, Any]) -> BigVGAN:
    """NVIDIA's settings name the hop; those of the speech decoder's variant do not."""
    published = "hop_size" in section
    return BigVGAN(BigVGANConfig.from_nvidia(section) if published else BigVGANConfig.from_dict(section))


_BUILD: Mapping[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "hift": lambda section: HiFT(HiFTConfig.from_dict(section)),
    "bigvgan": _bigvgan,
    "spectral": lambda section: SpectralVocoder.from_config(dict(section)),
}


def _configured(checkpoint: Checkpoint, build: Callable[[], Built]) -> Built:
    try:
        return build()
    except MALFORMED as error:
        raise InvalidCheckpoint(f"The decoder configuration of {checkpoint.root}: {error}.", _REFETCH) from error


def _fill(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Put all tensors into the model; names and shapes must match exactly."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for problem, names in (("lacks", expected.keys() - state.keys()), ("has unknown", state.keys() - expected.keys())):
        if names:
            shown = ", ".join(sorted(names)[:LISTED]) + (
                f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            )
            raise InvalidCheckpoint(f"{path} {problem} tensors: {shown}.", _REFETCH)
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            found = tuple(state[name].shape)
            raise InvalidCheckpoint(f"{path}: {name} is {found}, the configuration makes it {shape}.", _REFETCH)
    model.load_state_dict(state, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
