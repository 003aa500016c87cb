"""What a client sends to have a job done, before it has an id. Knows nothing about how it is carried out."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.schemas.edit import Edit

Lane = Literal["interactive", "batch"]
AudioFormat = Literal["wav", "flac", "mp3", "opus"]
SEED_MAX = 2**31 - 1


class GenerateSettings(BaseModel):
    """How new audio tokens are sampled.

    The defaults are the official release's as it is now; its first form had the repetition rule on (window 10).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float | None = Field(
        default=None, ge=0.0, le=2.0, description="By default the checkpoint's, 0.7 where it names none."
    )
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0, description="0 samples from the whole vocabulary.")
    repetition_window: int = Field(default=0, ge=0, description="Tokens looked back at; 0 switches the rule off.")
    repetition_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    max_duration_s: float | None = Field(
        default=None, gt=0.0, le=600.0, description="Upper bound of the new audio's length."
    )


class DecodeSettings(BaseModel):
    """How audio tokens become a waveform."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=10, ge=1, le=100, description="Euler steps of the flow.")
    cfg: float | None = Field(
        default=None, ge=0.0, le=5.0, description="Classifier-free guidance rate of the flow; else the checkpoint's."
    )


class TrainingRequest(BaseModel):
    """A training job: the name of a recipe and its settings, which the trainer checks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str = Field(min_length=1, max_length=64)
    settings: dict[str, Any] = Field(default_factory=dict)


class JobRequest(BaseModel):
    """One job: either an edit of the recording at `source_key`, or a training run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    edit: Edit | None = None
    training: TrainingRequest | None = None
    source_key: str | None = Field(
        default=None, description="Artifact key of the recording; the default is jobs/{id}/source/audio."
    )
    text: str | None = Field(default=None, max_length=4096, description="What is said in the recording.")
    iterations: int = Field(default=1, ge=1, le=10, description="How often the edit is applied to its own result.")
    n_best: int = Field(
        default=1, ge=1, le=32, description="Candidates drawn per iteration; the best scored one is kept."
    )
    seed: int = Field(default=0, ge=0, le=SEED_MAX)
    generate: GenerateSettings = Field(default_factory=GenerateSettings)
    decode: DecodeSettings = Field(default_factory=DecodeSettings)
    trim_before_mel: bool | None = Field(
        default=None, description="Cut silence from the reference mel too; left out, the checkpoint decides."
    )
    format: AudioFormat = "wav"
    lane: Lane = "interactive"
    timeout_s: float | None = Field(default=None, gt=0.0, description="The job fails when it takes longer.")
    webhook_url: str | None = Field(default=None, max_length=2048)

    @model_validator(mode="after")
    def _one_job(self) -> Self:
        if (self.edit is None) == (self.training is None):
            raise ValueError("a job holds either an edit or a training run")
        if self.edit is not None and self.edit.type == "clone" and self.iterations != 1:
            raise ValueError("a clone is made once: iterations must be 1")
        return self

    @model_validator(mode="after")
    def _knows_what_is_said(self) -> Self:
        if self.lacks_text:
            raise ValueError(f"an edit of type {self.edit and self.edit.type} needs text: what the recording says")
        return self

    @property
    def lacks_text(self) -> bool:
        """Whether the edit needs to know what the recording says, and the request does not tell."""
        return self.edit is not None and self.edit.needs_source_text and not (self.text and self.text.strip())
