"""What an operator can set about the tokenizer, by environment variables that begin with EDITX_TOKENIZER_."""

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class TokenizerSettings(BaseSettings):
    """Where and how the tokenizer's models run, and what it accepts."""

    model_config = SettingsConfigDict(env_prefix="EDITX_TOKENIZER_", env_ignore_empty=True, frozen=True)

    device: str = Field(default="cpu", description="Device of the models: cpu, cuda, cuda:0.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Of the linguistic encoder. bfloat16 is faster and changes some codes."
    )
    onnx_threads: int = Field(default=0, ge=0, description="Threads of each ONNX session; 0 lets onnxruntime choose.")
    cache_entries: int = Field(default=64, ge=0, description="Recordings whose result is kept in memory.")
    max_duration_s: float = Field(default=120.0, gt=0, description="Longest recording that is taken.")
    trim_before_mel: bool | None = Field(
        default=None,
        description="Cut silence from the prompt mel as from the codes. Better aligned than the published front end, "
        "which cuts the codes only. Left out, the checkpoint decides; a request can choose for itself.",
    )
