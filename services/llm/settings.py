"""What an operator can set about the language model, by environment variables that begin with EDITX_LLM_."""

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class LlmSettings(BaseSettings):
    """Where and how the language model runs, and what it accepts."""

    model_config = SettingsConfigDict(env_prefix="EDITX_LLM_", env_ignore_empty=True, frozen=True)

    engine: Literal["builtin", "vllm"] = Field(
        default="builtin", description="What runs the model. vllm: for GPUs, where the package is installed."
    )
    device: str = Field(default="cpu", description="Device of the model: cpu, cuda, cuda:0.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Of weights and cache. auto: bfloat16 on GPUs and on CPUs with instructions for it, else float32.",
    )
    quantize: Literal["auto", "none", "half", "int8"] = Field(
        default="auto",
        description="Of the weights. half: float16 for products in float32; int8: half the memory of bfloat16. auto: "
        "half on CPUs that compute in float32 and have the kernel, else none.",
    )  # fmt: skip
    slots: int = Field(default=16, ge=1, le=256, description="Sequences that are generated side by side.")
    candidates: int | None = Field(
        default=None, ge=1, le=32,
        description="Answers drawn where the text is known, of which the checkpoint's recogniser keeps the one that "
        "says it best; left out, as many as the checkpoint names. 1 draws once.",
    )  # fmt: skip
    guidance: float | None = Field(
        default=None, ge=0.0, le=10.0,
        description="How far the draws of an edit of emotion, style or speed go away from the same said plainly; left "
        "out, as far as the checkpoint says. 0 does without, in half the work.",
    )  # fmt: skip
    context: int = Field(default=8192, ge=64, description="Most tokens of one sequence, prompt and result together.")
    queue_limit: int = Field(default=256, ge=1, description="Requests that may wait; more are refused as overload.")
    prefix_cache_tokens: int = Field(
        default=16384,
        ge=0,
        description="Prompt tokens whose keys and values are kept, 32 KiB each in the 3B release. "
        "vLLM keeps as many as it has room for, or none for 0.",
    )
    stream_groups: int = Field(default=5, ge=1, description="Groups of five tokens (120 ms) in a piece of a stream.")
    vllm_memory_share: float = Field(
        default=0.9, gt=0.0, le=1.0, description="Of the GPU's memory that vLLM takes for weights, keys and values."
    )
    vllm_cache_gib: float = Field(
        default=0.0, ge=0.0, description="Memory for vLLM's keys and values; 0: what the share leaves. Set it on CPUs."
    )
