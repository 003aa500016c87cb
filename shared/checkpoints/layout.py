"""Where the files of a checkpoint lie: the published directory layout, found by name or by path.

Knows file names only. It opens no weights, imports no torch, and knows nothing about what the components compute.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import MissingComponent, UserError, reasons
from shared.languages import OF_TAGS, check_language
from shared.schemas.edit import Edit
from shared.tags import bracketed_tags, check_text_tags

EDITX_FOLDER = "Step-Audio-EditX"
TOKENIZER_FOLDER = "Step-Audio-Tokenizer"
DECODER_FOLDER = "CosyVoice-300M-25Hz"
VOCODER_FILES = ["hift.safetensors", "hift.pt", "vocoder.safetensors", "bigvgan_generator.pt"]
LINGUISTIC_FOLDER = "dengcunqin/speech_paraformer-large_asr_nat-zh-cantonese-en-16k-vocab8501-online"
METADATA_FILE = "editx.json"
REWARD_FOLDER = "reward"
REWARD_HEAD = "reward_head.safetensors"
RECOGNIZER_FILE = "recognizer.safetensors"

MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What building a model from settings of another form may raise."""

BUNDLED = ("nano",)
HOME_VARIABLE = "EDITX_CHECKPOINTS_DIR"


class MissingCheckpoint(UserError):
    """The name or path given for a checkpoint leads nowhere."""

    default_code = "checkpoint_not_found"
    exit_code = 3


class InvalidCheckpoint(UserError):
    """A file of the checkpoint is there and is not what it should be."""

    default_code = "checkpoint_invalid"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InvalidCheckpoint for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidCheckpoint(f"{path} is not JSON: {error}.", "Fetch it again.") from error
    if not isinstance(content, dict):
        raise InvalidCheckpoint(f"{path} holds no JSON object.", "Fetch it again.")
    return content


class TrainedOn(BaseModel):
    """Which edits a checkpoint has learned. An empty list means the edit type was not trained."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    clone: bool = True
    emotion: tuple[str, ...] = ()
    style: tuple[str, ...] = ()
    speed: tuple[str, ...] = ()
    paralinguistic: tuple[str, ...] = ()
    denoise: bool = False
    vad: bool = False
    languages: tuple[str, ...] = ()


class Metadata(BaseModel):
    """Contents of ``editx.json``. ``trained_on`` is None for a release that does not say: take the published edits.

    ``trim_before_mel`` says that the flow learned from reference mels cut like their codes; the official one did not.
    ``temperature`` is what the language model's tokens are best drawn at; None leaves the usual 0.7. ``candidates`` is
    how many answers to draw where the recogniser, if there is one, can tell which says its text best. ``guidance`` is
    how far the draws of an edit of the manner go away from the same said plainly. ``manners`` is what each manner, such
    as ``emotion/happy``, changes on average in what training read (``shared.prosody.MEASURES``), by which that
    answer is chosen which says its text and shows its manner best.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    version: str = "unknown"
    trained_on: TrainedOn | None = None
    trim_before_mel: bool = False
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    candidates: int = Field(default=1, ge=1, le=32)
    guidance: float = Field(default=0.0, ge=0.0, le=10.0)
    manners: dict[str, tuple[float, float, float, float, float]] = {}

    def knows(self, edit_type: str, detail: str | None = None) -> bool:
        """Whether this checkpoint was trained on an edit type (and detail, such as ``emotion`` and ``happy``).

        ``remove`` goes with the type: who learned to add an emotion learned to take it away.
        """
        if self.trained_on is None:
            return True
        learned = getattr(self.trained_on, edit_type, False)
        if isinstance(learned, bool):
            return learned
        return bool(learned) if detail in (None, "remove") else detail in learned

    def untrained(self, edit: Edit) -> list[str]:
        """What an edit asks for and this checkpoint was not trained on: the edit itself, or [tags] in its new text."""
        if self.trained_on is None:
            return []
        if not self.knows(edit.type, edit.detail):
            return [str(edit)]
        tags = dict.fromkeys(bracketed_tags(check_text_tags(edit.target_text or "")))
        return [f"[{tag}]" for tag in tags if not self._knows_tag(self.trained_on, tag)]

    def warnings(self, edit: Edit | None) -> list[str]:
        """What a user should know of an edit: that the checkpoint was not trained on it, and on what instead."""
        if edit is None or not (untrained := self.untrained(edit)):
            return []
        known = getattr(self.trained_on, edit.type, ())
        trained = f"It knows {edit.type}: {', '.join(known)}." if known and not isinstance(known, bool) else ""
        asked = ", ".join(untrained)
        warning = f"The checkpoint {self.name} was not trained on {asked}: it may not do what you ask. {trained}"
        return [warning.rstrip()]

    def check_languages(self, *texts: str | None) -> None:
        """Raise UserError for a text in none of the checkpoint's languages."""
        if self.trained_on is not None:
            for text in texts:
                check_language(text or "", self.trained_on.languages, self.name)

    def check_candidates(self, count: int, *, has_reward: bool) -> None:
        """Raise UserError for several candidates where no reward model chooses among them."""
        if count > 1 and not has_reward:
            raise UserError(f"The checkpoint {self.name} has no reward model to choose among candidates.",
                            "Ask for one (n_best: 1), or serve a checkpoint that has one.",
                            "no_reward_model")  # fmt: skip

    def _knows_tag(self, trained_on: TrainedOn, tag: str) -> bool:
        if (language := OF_TAGS.get(tag)) is not None:
            return language in trained_on.languages
        return tag in trained_on.paralinguistic


def checkpoints_home() -> Path:
    """Folder of the fetched checkpoints: ``EDITX_CHECKPOINTS_DIR``, else ``~/.cache/editx/checkpoints``."""
    configured = os.environ.get(HOME_VARIABLE)
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "editx" / "checkpoints"


def _named_places(name: str) -> list[Path]:
    places = [checkpoints_home() / name]
    if name in BUNDLED:
        repository = Path(__file__).resolve().parents[2]
        places = [repository / "models" / name, Path(sys.prefix) / "share" / "editx" / "models" / name, *places]
    return places


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory in the published layout.

    ``root`` holds ``Step-Audio-EditX/`` and ``Step-Audio-Tokenizer/``, or is the first of them with the second beside
    it, or holds the contents of both flat. Path properties check that the file is there and raise MissingComponent.
    """

    root: Path

    @classmethod
    def resolve(cls, source: str | Path) -> Self:
        """Find a checkpoint by directory, or by name (``nano`` is bundled, others lie in ``checkpoints_home()``).

        Raises MissingCheckpoint when neither exists. Components are checked when they are asked for.
        """
        path = Path(source).expanduser()
        if path.is_dir():
            return cls(path.resolve())
        is_name = isinstance(source, str) and Path(source).name == source
        places = _named_places(str(source)) if is_name else []
        for place in places:
            if place.is_dir():
                return cls(place.resolve())
        tried = ", ".join(str(place) for place in [path.absolute(), *places])
        raise MissingCheckpoint(
            f"No checkpoint '{source}'. Looked for: {tried}",
            "Give a directory in the published layout, or fetch one with `editx checkpoint fetch official`.",
        )

    @cached_property
    def editx_dir(self) -> Path:
        """Folder of the language model and, below it, of the decoder."""
        nested = self.root / EDITX_FOLDER
        return nested if nested.is_dir() else self.root

    @cached_property
    def tokenizer_dir(self) -> Path:
        """Folder of the two audio tokenizers."""
        nested, beside = self.root / TOKENIZER_FOLDER, self.root.parent / TOKENIZER_FOLDER
        if nested.is_dir():
            return nested
        return beside if self.root.name == EDITX_FOLDER and beside.is_dir() else self.root

    @property
    def decoder_dirs(self) -> tuple[Path, ...]:
        """Folders searched for the flow, the vocoder and the speaker encoder, in order."""
        return self.editx_dir / DECODER_FOLDER, self.editx_dir

    @property
    def linguistic_dirs(self) -> tuple[Path, ...]:
        """Folders searched for the linguistic encoder, in order."""
        return self.tokenizer_dir / LINGUISTIC_FOLDER, self.tokenizer_dir

    @property
    def step1_dir(self) -> Path:
        """Folder with the ``config.json`` and the weights of the language model."""
        return self._find("language model", [self.editx_dir], ["config.json"]).parent

    @property
    def step1_files(self) -> tuple[Path, ...]:
        """The language model's weight files: every shard that the index names, else the single file."""
        folder = self.step1_dir
        index = folder / "model.safetensors.index.json"
        if not index.is_file():
            names = ["model.safetensors", "model-00001.safetensors"]
            return (self._find("language model weights", [folder], names),)
        try:
            shards = sorted(set(read_json(index)["weight_map"].values()))
        except MALFORMED as error:
            raise InvalidCheckpoint(
                f"{index} is not a weight index: {error}",
                "Fetch the file again, or remove it if the weights are in one file.",
            ) from error
        return tuple(self._find("language model weights", [folder], [str(Path(shard).name)]) for shard in shards)

    @property
    def text_tokenizer_file(self) -> Path:
        """The sentencepiece model."""
        return self._find("text tokenizer", [self.editx_dir], ["tokenizer.model"])

    @property
    def cosyvoice_yaml(self) -> Path:
        """Sizes of the flow and the vocoder."""
        return self._find("decoder configuration", self.decoder_dirs, ["cosyvoice.yaml"])

    @property
    def flow_file(self) -> Path:
        """Weights of the flow-matching model, codes to mel."""
        return self._find("flow", self.decoder_dirs, ["flow.safetensors", "flow.pt"])

    @property
    def vocoder_file(self) -> Path:
        """Weights of the vocoder, mel to waveform."""
        return self._find("vocoder", self.decoder_dirs, VOCODER_FILES)

    @property
    def speaker_onnx(self) -> Path:
        """The speaker encoder."""
        return self._find("speaker encoder", self.decoder_dirs, ["campplus.onnx"])

    @property
    def linguistic_dir(self) -> Path:
        """FunASR folder of the linguistic encoder: ``config.yaml``, ``am.mvn`` and the weights."""
        return self._find("linguistic encoder configuration", self.linguistic_dirs, ["config.yaml"]).parent

    @property
    def linguistic_file(self) -> Path:
        """Weights of the linguistic encoder."""
        return self._find("linguistic encoder", [self.linguistic_dir], ["model.safetensors", "model.pt"])

    @property
    def linguistic_cmvn_file(self) -> Path:
        """Mean and variance of the linguistic encoder's features, Kaldi text format."""
        return self._find("linguistic feature statistics", [self.linguistic_dir], ["am.mvn"])

    @property
    def centroids_file(self) -> Path:
        """Linguistic codebook, (1024, d) float32."""
        return self._find("linguistic centroids", [self.tokenizer_dir], ["linguistic_tokenizer.npy"])

    @property
    def semantic_onnx(self) -> Path:
        """The semantic tokenizer."""
        return self._find("semantic tokenizer", [self.tokenizer_dir], ["speech_tokenizer_v1.onnx"])

    @property
    def recognizer_file(self) -> Path:
        """The recogniser on audio tokens, which the published release has not."""
        return self._find("recogniser", [self.root], [RECOGNIZER_FILE])

    @property
    def has_recognizer(self) -> bool:
        """Whether the checkpoint can tell which of several answers says its text best."""
        return (self.root / RECOGNIZER_FILE).is_file()

    @property
    def reward_dirs(self) -> tuple[Path, ...]:
        """Where a reward model may lie: a checkpoint may lack one, or be one."""
        return self.root / REWARD_FOLDER, self.root, self.editx_dir

    @property
    def has_reward(self) -> bool:
        """Whether the checkpoint can choose the best of several candidates."""
        return any((folder / REWARD_HEAD).is_file() for folder in self.reward_dirs)

    @cached_property
    def metadata(self) -> Metadata:
        """``editx.json``, or the folder's name and nothing else when the release has no such file."""
        path = self.root / METADATA_FILE
        if not path.is_file():
            return Metadata(name=self.root.name)
        try:
            return Metadata.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise InvalidCheckpoint(
                f"{path} is not valid: {reasons(error)}.", "docs/checkpoints.md describes the file."
            ) from error

    def _find(self, component: str, folders: Sequence[Path], names: Sequence[str]) -> Path:
        places = [folder / name for folder in folders for name in names]
        for place in places:
            if place.is_file():
                return place
        raise MissingComponent(
            component=f"The {component} ({' or '.join(names)})",
            where=f"the checkpoint {self.root} has none of {', '.join(str(place) for place in places)}",
            hint=f"Put the file there; `editx checkpoint verify {self.root}` lists everything that is missing.",
        )
