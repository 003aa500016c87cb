"""What a user asks to be done to a recording: one edit.

Knows the kinds of edit, not which tags a checkpoint was trained on.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

EditType = Literal["clone", "emotion", "style", "speed", "denoise", "vad", "paralinguistic"]
TAGGED: frozenset[str] = frozenset({"emotion", "style", "speed"})
REWORDED: frozenset[str] = frozenset({"clone", "paralinguistic"})
TEXTLESS: frozenset[str] = frozenset({"denoise", "vad"})
REMOVE = "remove"


class Edit(BaseModel):
    """One edit: a type, for some types a tag, and for some a new text (arXiv 2511.03601).

    `emotion`, `style` and `speed` take a tag in `detail` ("happy", "whisper", "faster"; "remove" takes an emotion or
    style away). `clone` speaks `target_text` with the reference's voice; `paralinguistic` says `target_text`, the same
    words with sounds such as [Laughter] between them. `denoise` and `vad` take neither.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: EditType
    detail: str | None = Field(default=None, max_length=64, description="The tag of an emotion, style or speed edit.")
    target_text: str | None = Field(
        default=None, max_length=4096, description="The words of a clone or paralinguistic edit."
    )

    @model_validator(mode="after")
    def _fields_fit_the_type(self) -> Self:
        if (self.type in TAGGED) != (self.detail is not None):
            need = "needs a tag in detail" if self.type in TAGGED else "takes no detail"
            raise ValueError(f"an edit of type {self.type} {need}")
        if (self.type in REWORDED) != (self.target_text is not None):
            need = "needs target_text" if self.type in REWORDED else "takes no target_text"
            raise ValueError(f"an edit of type {self.type} {need}")
        if self.target_text is not None and not self.target_text.strip():
            raise ValueError("target_text is blank")
        if self.type == "speed" and self.detail == REMOVE:
            raise ValueError("speed has no remove")
        return self

    @property
    def needs_source_text(self) -> bool:
        """Whether the instruction quotes the recording's transcript: every type except denoise and vad."""
        return self.type not in TEXTLESS

    def __str__(self) -> str:
        return f"{self.type} {self.detail}" if self.detail else self.type
