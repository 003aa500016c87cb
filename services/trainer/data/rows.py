"""One row of a training set: an edit (or clone), the audio it starts from, the answer; a preference has a worse one.

Audio tokens travel inline as base64 of little-endian uint16, so that a set of codes is one file. A row says where it
comes from and under which licence. Knows nothing about files of rows.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)

from shared.codes import GROUP_S, Codes, split
from shared.errors import EditxError, UserError
from shared.prompts import Turn, edit_turns
from shared.schemas.edit import Edit
from shared.tags import check_tag, check_text_tags

SCHEMA_VERSION = 1


def _read_codes(value: object) -> Codes:
    if isinstance(value, str):
        value = np.frombuffer(base64.b64decode(value), dtype="<u2").astype(np.int32)
    mixed = np.asarray(value, dtype=np.int32)
    try:
        split(mixed)
    except UserError as error:
        raise ValueError(error.message) from error
    if not len(mixed):
        raise ValueError("no audio tokens")
    return mixed


def _write_codes(mixed: Codes) -> str:
    return base64.b64encode(mixed.astype("<u2").tobytes()).decode()


MixedCodes = Annotated[Any, BeforeValidator(_read_codes), PlainSerializer(_write_codes, when_used="json")]
"""Mixed ids (groups * 5,) int32; base64 in JSON, a list of ints is read as well."""


class Side(BaseModel):
    """One recording of a row: its words, its audio tokens, and where the audio itself lies if it was kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    text: str = Field(min_length=1)
    mixed: MixedCodes
    audio: str | None = Field(default=None, description="The recording in the folder of its set, if it was kept.")
    sha256: str = Field(
        default_factory=lambda known: hash_codes(known["mixed"]) if "mixed" in known else "",
        description="Of the recording's samples (`hash_audio`), or of the tokens where it was not there.",
    )

    @field_validator("audio")
    @classmethod
    def _in_its_folder(cls, audio: str | None) -> str | None:
        if audio is not None and (PurePosixPath(audio).is_absolute() or ".." in PurePosixPath(audio).parts):
            raise ValueError("a recording lies in the folder of its set")
        return audio

    @field_validator("text")
    @classmethod
    def _has_words(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("the text is blank")
        return text

    @property
    def fingerprints(self) -> frozenset[str]:
        """What two sides of one recording share: the hash of its samples, where it was there, and of its tokens."""
        return frozenset({self.sha256, hash_codes(self.mixed)})

    @property
    def is_hashed_by_tokens(self) -> bool:
        """Whether the recording itself was not there when the row was made."""
        return self.sha256 == hash_codes(self.mixed)

    @property
    def seconds(self) -> float:
        return len(self.mixed) // 5 * GROUP_S


class Row(BaseModel):
    """One example. A clone (zero-shot speech) has the reference as source and says `edit.target_text`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    id: str = Field(min_length=1, max_length=128)
    edit: Edit
    source: Side
    target: Side
    rejected: Side | None = Field(default=None, description="A worse answer to the same prompt, for preferences.")
    speaker: str = Field(min_length=1)
    language: str = Field(min_length=2, max_length=16)
    licence: str = Field(min_length=1, description="Of the recordings, as an SPDX id where there is one.")
    origin: str = Field(min_length=1, description="The corpus or teacher that the row comes from.")
    margin: float | None = Field(default=None, description="How clearly target and source (or rejected) differ.")
    rated_by: str | None = None

    @model_validator(mode="after")
    def _known_tags(self) -> Self:
        try:
            if self.edit.detail is not None:
                check_tag(self.edit.type, self.edit.detail)
            if self.edit.target_text is not None:
                check_text_tags(self.edit.target_text)
        except UserError as error:
            raise ValueError(error.message) from error
        if self.margin is not None and not math.isfinite(self.margin):
            raise ValueError("the margin is no number")
        return self

    @property
    def category(self) -> str:
        """What thresholds, statistics and accuracies are grouped by: "emotion happy", "clone", "denoise"."""
        return self.edit.type if self.edit.target_text is not None else str(self.edit)

    def turns(self) -> list[Turn]:
        """The prompt in the chat format."""
        return edit_turns(self.edit, self.source.text, self.source.mixed)

    def content_key(self) -> str:
        """Equal for rows that teach the same: prompt, answer and rejected answer."""
        parts = [self.edit.model_dump_json(), self.source.text, self.source.sha256, self.target.sha256]
        parts += [self.rejected.sha256] if self.rejected else []
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def hash_codes(mixed: Codes) -> str:
    """SHA-256 of audio tokens."""
    return hashlib.sha256(np.asarray(mixed).astype("<u2").tobytes()).hexdigest()


def as_pcm(samples: np.ndarray) -> np.ndarray:
    """Samples as 16-bit ones, (n,) int16: what was read from a 16-bit file comes out as it was there."""
    return (np.asarray(samples, np.float64) * 32768).round().clip(-32768, 32767).astype("<i2")


def hash_audio(samples: np.ndarray, sample_rate_hz: int) -> str:
    """SHA-256 of a recording as 16-bit samples: the same for the same samples in another lossless container."""
    return hashlib.sha256(sample_rate_hz.to_bytes(4, "little") + as_pcm(samples).tobytes()).hexdigest()


def reason(error: Exception) -> str:
    """Why a row is no good, in one line."""
    if isinstance(error, ValidationError):
        parts: Sequence[str] = [
            f"{'.'.join(str(p) for p in problem['loc']) or 'row'}: {problem['msg']}" for problem in error.errors()
        ]
        return "; ".join(parts)
    return error.message if isinstance(error, EditxError) else f"{type(error).__name__}: {error}"
