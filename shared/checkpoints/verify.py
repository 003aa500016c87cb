"""Is a checkpoint whole and consistent? Files, tensor names, shapes and types against what its config files imply.

Expected tensors come from the model classes, built without memory from the checkpoint's sizes. Reads headers, not
numbers (hashes excepted), so that a release of many gigabytes takes seconds. Says nothing about how it sounds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from shared.checkpoints import decoder, manifest, recognizer, reward
from shared.checkpoints.layout import MALFORMED, Checkpoint, InvalidCheckpoint, read_json
from shared.checkpoints.tokenizer import load_mel_config
from shared.checkpoints.unfilled import unfilled
from shared.checkpoints.weights import TensorHeader, read_headers
from shared.codes import AUDIO_VOCAB, LINGUISTIC_SIZE
from shared.errors import MissingComponent, UserError
from shared.models.flow import Flow, FlowConfig
from shared.models.linguistic import LinguisticConfig, LinguisticEncoder
from shared.models.recognizer import Recognizer
from shared.models.step1 import Step1, Step1Config
from shared.models.weight_norm import fold_weight_norm

FLOATS = ("float32", "bfloat16", "float16")
SPECIAL_PIECES = {3: "<|EOT|>", 4: "<|BOT|>"}

Problem = Literal["missing", "extra", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be: a file, a tensor or a value (`what`), and how (`detail`)."""

    problem: Problem
    what: str
    detail: str = ""


@dataclass
class ComponentReport:
    """What was found of one component."""

    name: str
    files: list[Path] = field(default_factory=list)
    tensors: int = 0
    parameters: int = 0
    dtype: str = ""
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings

    def find(self, problem: Problem, what: str, detail: str = "") -> None:
        """Note a finding."""
        self.findings.append(Finding(problem, what, detail))


@dataclass(frozen=True)
class Report:
    """The findings for a whole checkpoint."""

    root: Path
    name: str
    components: list[ComponentReport]

    @property
    def ok(self) -> bool:
        return all(component.ok for component in self.components)

    def document(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "root": str(self.root),
            "name": self.name,
            "ok": self.ok,
            "components": [
                {
                    "name": part.name,
                    "ok": part.ok,
                    "files": [str(path) for path in part.files],
                    "tensors": part.tensors,
                    "parameters": part.parameters,
                    "dtype": part.dtype,
                    "findings": [vars(finding) for finding in part.findings],
                }
                for part in self.components
            ],
        }


def verify(checkpoint: Checkpoint, *, hashes: bool = True) -> Report:
    """Check every component; findings are collected, nothing is raised for a bad file.

    With `hashes`, every file that SHA256SUMS lists is read and compared (about a second per gigabyte).
    """
    checks: dict[str, Callable[[Checkpoint, ComponentReport], None]] = {
        "metadata": _metadata,
        "language model": _step1,
        "text tokenizer": _text_tokenizer,
        "flow": _flow,
        "vocoder": _vocoder,
        "speaker encoder": _speaker,
        "linguistic encoder": _linguistic,
        "semantic tokenizer": _semantic,
    }
    if (checkpoint.root / reward.FOLDER).is_dir():
        checks["reward model"] = _reward
    if checkpoint.has_recognizer:
        checks["recogniser"] = _recognizer
    if hashes and (checkpoint.root / manifest.FILE).is_file():
        checks["hashes"] = _hashes
    components = []
    for name, check in checks.items():
        component = ComponentReport(name)
        try:
            check(checkpoint, component)
        except MissingComponent as error:
            component.find("missing", error.component, error.where)
        except UserError as error:
            component.find("wrong", name, str(error))
        except OSError as error:
            component.find("wrong", error.filename or name, f"cannot be read: {error.strerror}")
        except MALFORMED as error:
            component.find("wrong", f"{name} configuration", f"{type(error).__name__}: {error}")
        components.append(component)
    return Report(checkpoint.root, _name(checkpoint), components)


def headers_of(module: Callable[[], torch.nn.Module]) -> dict[str, TensorHeader]:
    """Names, shapes and types of a module's tensors, without memory for them."""
    with unfilled():
        return {name: TensorHeader.of(tensor) for name, tensor in module().state_dict().items()}


def compare(
    expected: Mapping[str, TensorHeader], found: Mapping[str, TensorHeader], dtypes: Iterable[str] = FLOATS
) -> list[Finding]:
    """Missing, extra and wrong tensors. A floating-point tensor may have any of `dtypes`, others must match."""
    findings = [Finding("missing", name, str(expected[name])) for name in expected if name not in found]
    findings += [Finding("extra", name, str(found[name])) for name in found if name not in expected]
    allowed = tuple(dtypes)
    for name in expected.keys() & found.keys():
        wanted, got = expected[name], found[name]
        right_dtype = got.dtype in allowed if wanted.dtype in FLOATS else got.dtype == wanted.dtype
        if wanted.shape != got.shape:
            findings.append(Finding("wrong", name, f"shape {list(got.shape)}, expected {list(wanted.shape)}"))
        elif not right_dtype:
            findings.append(Finding("wrong", name, f"type {got.dtype}, expected {' or '.join(allowed)}"))
    return sorted(findings, key=lambda finding: (finding.problem, finding.what))


def _weigh(component: ComponentReport, expected: Mapping[str, TensorHeader], found: Mapping[str, TensorHeader]) -> None:
    component.findings += compare(expected, found)
    component.tensors = len(found)
    component.parameters = sum(int(np.prod(header.shape)) for header in found.values())
    component.dtype = ", ".join(sorted({header.dtype for header in found.values()}))


def _metadata(checkpoint: Checkpoint, component: ComponentReport) -> None:
    path = checkpoint.root / "editx.json"
    component.files = [path] if path.is_file() else []
    _ = checkpoint.metadata


def _step1(checkpoint: Checkpoint, component: ComponentReport) -> None:
    config_file = checkpoint.step1_dir / "config.json"
    component.files = [config_file]
    config = Step1Config.from_dict(read_json(config_file))
    component.files += checkpoint.step1_files
    found: dict[str, TensorHeader] = {}
    places: dict[str, str] = {}
    for path in checkpoint.step1_files:
        shard = read_headers(path)
        for name in found.keys() & shard.keys():
            component.find("extra", name, f"is in {places[name]} and in {path.name}")
        found |= shard
        places |= dict.fromkeys(shard, path.name)
    _weigh(component, headers_of(lambda: Step1(config)), found)
    index = checkpoint.step1_dir / "model.safetensors.index.json"
    if index.is_file():
        component.files.append(index)
        for name, place in read_json(index)["weight_map"].items():
            if places.get(name, place) != place:
                component.find("wrong", name, f"the index says {place}, it is in {places[name]}")


def _reward(checkpoint: Checkpoint, component: ComponentReport) -> None:
    folder = reward.reward_folder(checkpoint)
    trunk = Checkpoint(folder)
    component.files = [trunk.step1_dir / "config.json", *trunk.step1_files, folder / reward.HEAD]
    config = Step1Config.from_dict(read_json(component.files[0]))
    found = {name: header for path in trunk.step1_files for name, header in read_headers(path).items()}
    expected = headers_of(lambda: Step1(config))
    if "lm_head.weight" not in found:
        del expected["lm_head.weight"]
    _weigh(component, expected, found)
    shapes = {"weight": (1, config.hidden_size), "bias": (1,), "mean": (), "std": ()}
    head = {name: TensorHeader(shape, "float32") for name, shape in shapes.items()}
    component.findings += compare(head, read_headers(folder / reward.HEAD))


def _recognizer(checkpoint: Checkpoint, component: ComponentReport) -> None:
    component.files = [checkpoint.recognizer_file]
    config = recognizer.read_config(checkpoint.recognizer_file)
    _weigh(component, headers_of(lambda: Recognizer(config)), read_headers(checkpoint.recognizer_file))


def _text_tokenizer(checkpoint: Checkpoint, component: ComponentReport) -> None:
    from sentencepiece import SentencePieceProcessor

    path = checkpoint.text_tokenizer_file
    component.files = [path]
    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise InvalidCheckpoint(f"{path} is not a sentencepiece model ({error}).", "Fetch it again.") from error
    for number, piece in SPECIAL_PIECES.items():
        if pieces.id_to_piece(number) != piece:
            component.find("wrong", f"piece {number}", f"is {pieces.id_to_piece(number)}, expected {piece}")
    first, last = pieces.piece_to_id("<audio_0>"), pieces.piece_to_id(f"<audio_{AUDIO_VOCAB - 1}>")
    if first == pieces.unk_id():
        component.find("missing", "<audio_0>", "the piece of the first audio token")
    elif last - first != AUDIO_VOCAB - 1:
        component.find("wrong", "audio tokens", f"<audio_0> is {first} and <audio_{AUDIO_VOCAB - 1}> is {last}")
    vocab_size = int(read_json(checkpoint.step1_dir / "config.json")["vocab_size"])
    if pieces.vocab_size() > vocab_size:
        component.find("wrong", "vocabulary", f"{pieces.vocab_size()} pieces, the language model has {vocab_size} rows")


def _flow(checkpoint: Checkpoint, component: ComponentReport) -> None:
    component.files = [checkpoint.cosyvoice_yaml]
    config = FlowConfig.from_dict(decoder.read_config(checkpoint)["flow"])
    component.files.append(checkpoint.flow_file)
    _weigh(component, headers_of(lambda: Flow(config)), read_headers(checkpoint.flow_file))
    if (bins := load_mel_config(checkpoint).num_mels) != config.output_size:
        component.find("wrong", "mel_conf num_mels", f"{bins}, the flow makes {config.output_size}")


def _vocoder(checkpoint: Checkpoint, component: ComponentReport) -> None:
    component.files = [checkpoint.vocoder_file]
    stored = {name: header.meta() for name, header in read_headers(checkpoint.vocoder_file).items()}
    found = {name: TensorHeader.of(tensor) for name, tensor in fold_weight_norm(stored).items()}
    model = decoder.build_vocoder(checkpoint)  # not on the meta device: some vocoders compute filters when built
    _weigh(component, {name: TensorHeader.of(tensor) for name, tensor in model.state_dict().items()}, found)


def _linguistic(checkpoint: Checkpoint, component: ComponentReport) -> None:
    component.files = [checkpoint.linguistic_dir / "config.yaml"]
    config = LinguisticConfig.from_published(decoder.read_yaml(checkpoint.linguistic_dir / "config.yaml"))
    component.files += [checkpoint.linguistic_file, checkpoint.linguistic_cmvn_file, checkpoint.centroids_file]
    expected = headers_of(lambda: torch.nn.ModuleDict({"encoder": LinguisticEncoder(config)}))
    found = read_headers(checkpoint.linguistic_file)
    _weigh(component, expected, {name: header for name, header in found.items() if name.startswith("encoder.")})
    for part in ("AddShift", "Rescale"):
        if (count := _cmvn_values(checkpoint.linguistic_cmvn_file, part)) != config.input_size:
            component.find("wrong", f"am.mvn {part}", f"{count} values, expected {config.input_size}")
    centroids = _npy_header(checkpoint.centroids_file)
    wanted = TensorHeader((LINGUISTIC_SIZE, config.output_size), "float32")
    if centroids != wanted:
        component.find("wrong", checkpoint.centroids_file.name, f"{centroids}, expected {wanted}")


def _speaker(checkpoint: Checkpoint, component: ComponentReport) -> None:
    size = int(decoder.read_config(checkpoint)["flow"].get("spk_embed_dim", 192))
    component.files = [checkpoint.speaker_onnx]
    inputs, outputs = _onnx_ports(checkpoint.speaker_onnx)
    _expect_port(component, "input", inputs, 0, "tensor(float)", (None, None, 80))
    _expect_port(component, "output", outputs, 0, "tensor(float)", (None, size))


def _semantic(checkpoint: Checkpoint, component: ComponentReport) -> None:
    component.files = [checkpoint.semantic_onnx]
    inputs, outputs = _onnx_ports(checkpoint.semantic_onnx)
    _expect_port(component, "input", inputs, 0, "tensor(float)", (None, None, None))
    _expect_port(component, "input", inputs, 1, "tensor(int32)", (None,))
    if not outputs or not outputs[0][1].startswith("tensor(int"):
        component.find("wrong", "output 0", f"{outputs[:1]}, expected integer codes")


def _hashes(checkpoint: Checkpoint, component: ComponentReport) -> None:
    component.files = [checkpoint.root / manifest.FILE]
    for name, listed in (manifest.read(checkpoint.root) or {}).items():
        path = checkpoint.root / name
        if not path.is_file():
            component.find("missing", name, f"listed in {manifest.FILE}")
        elif (digest := manifest.sha256(path)) != listed:
            component.find("wrong", name, f"sha256 {digest}, listed {listed}")


def _name(checkpoint: Checkpoint) -> str:
    try:
        return checkpoint.metadata.name
    except InvalidCheckpoint:
        return checkpoint.root.name


Port = tuple[str, str, tuple[Any, ...]]


def _onnx_ports(path: Path) -> tuple[list[Port], list[Port]]:
    """Inputs and outputs of an ONNX graph as (name, type, shape)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InvalidCheckpoint(f"{path} is not a working ONNX graph ({reason}).", "Fetch it again.") from error
    return (
        [(port.name, port.type, tuple(port.shape)) for port in session.get_inputs()],
        [(port.name, port.type, tuple(port.shape)) for port in session.get_outputs()],
    )


def _expect_port(
    component: ComponentReport, kind: str, ports: list[Port], index: int, dtype: str, shape: tuple[int | None, ...]
) -> None:
    """A port must have the type and rank, and the sizes where both sides name one."""
    if index >= len(ports):
        component.find("missing", f"{kind} {index}", f"{dtype} {list(shape)}")
        return
    name, found_dtype, found = ports[index]
    fits = len(found) == len(shape) and all(
        wanted is None or not isinstance(size, int) or size == wanted for wanted, size in zip(shape, found, strict=True)
    )
    if found_dtype != dtype or not fits:
        component.find("wrong", f"{kind} '{name}'", f"{found_dtype} {list(found)}, expected {dtype} {list(shape)}")


def _cmvn_values(path: Path, part: str) -> int:
    """How many values Kaldi's text form of the feature statistics holds for `AddShift` or `Rescale`."""
    text = path.read_text(encoding="utf-8", errors="replace")
    values = re.search(rf"<{part}>[^<]*<LearnRateCoef>[^\[]*\[([^\]]*)\]", text)
    return len(values[1].split()) if values else 0


def _npy_header(path: Path) -> TensorHeader:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InvalidCheckpoint(f"{path} is not a NumPy array ({error}).", "Fetch it again.") from error
    return TensorHeader(tuple(array.shape), str(array.dtype))
