"""What an operator can set about the decoder, by environment variables that begin with EDITX_DECODER_."""

from typing import Literal

from pydantic import Field, PositiveInt
from pydantic_settings import BaseSettings, SettingsConfigDict


class DecoderSettings(BaseSettings):
    """Where and how flow and vocoder run, and what they accept."""

    model_config = SettingsConfigDict(env_prefix="EDITX_DECODER_", env_ignore_empty=True, frozen=True)

    device: str = Field(default="cpu", description="Device of both models: cpu, cuda, cuda:0.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Of the flow. auto: bfloat16 on GPUs and on CPUs with instructions for it, else float32: without "
        "such instructions half precision is many times slower.",
    )
    vocoder_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Of the vocoder's large parts. bfloat16: noise 35 dB below the signal; slows BigVGAN on CPUs.",
    )
    batch_frames: int = Field(
        default=8000, ge=100, description="Most mel frames (50 a second, reference included) that run together."
    )
    padding_share: float = Field(
        default=0.25,
        ge=0.0,
        le=1.0,
        description="Most padding that a batch may hold, as a share of its longest request.",
    )
    max_duration_s: float = Field(default=600.0, gt=0, description="Longest reference and result together.")
    chunk_tokens: tuple[PositiveInt, ...] = Field(
        default=(12, 15, 30, 45), min_length=1,
        description="Chunks of a stream in 40 ms tokens: the first, the second, ..., and the last ever after. With the "
        "flow's look-ahead of 3, these sizes take one, one, two and three pieces of the language model's stream.",
    )  # fmt: skip
    voice_cache_mb: int = Field(
        default=256, ge=0, description="Memory for references that streams have begun from: the next begins at once. "
        "A reference of 7 s takes 37 MB in nano, 240 MB in the 3B release.",
    )  # fmt: skip
    max_sessions: int = Field(default=32, ge=1, description="Streams that may be open at once.")
    session_idle_s: float = Field(
        default=60.0, gt=0, description="A stream without a new chunk for this long is closed."
    )
