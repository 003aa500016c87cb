"""What an operator can set about the reward model, by environment variables that begin with EDITX_REWARD_."""

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class RewardSettings(BaseSettings):
    """Where and how the reward model runs."""

    model_config = SettingsConfigDict(env_prefix="EDITX_REWARD_", env_ignore_empty=True, frozen=True)

    device: str = Field(default="cpu", description="Device of the model: cpu, cuda, cuda:0.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="Of the weights.")
    max_tokens: int = Field(default=8192, ge=64, description="Most tokens of a prompt and an answer together.")
