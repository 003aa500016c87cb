"""What an operator can set about the trainer, by environment variables that begin with EDITX_TRAINER_."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class TrainerSettings(BaseSettings):
    """Where training runs live on a worker, and where published checkpoints go."""

    model_config = SettingsConfigDict(env_prefix="EDITX_TRAINER_", frozen=True)

    runs: Path = Field(default=Path("out/training"), description="Folder of the run folders, one per job.")
    device: str = Field(default="cpu", description="Device of training: cpu, cuda, cuda:0.")
    threads: int = Field(default=0, ge=0, description="Threads of a CPU; 0 leaves it to torch.")
    publish: Path | None = Field(
        default=None, description="Folder for published checkpoints; by default where names are looked up."
    )
    servers: str = Field(
        default="",
        description="Servers that load at once what a job published, if that is their checkpoint: triton://host:port, "
        "several with commas between.",
    )
    pool: str = Field(
        default="", description="Servers that draw PPO's rollouts: triton://host:port, several with commas between."
    )
    pool_folder: Path | None = Field(
        default=None, description="Folder of their weights; they load from the link `current` in it."
    )
    reward_url: str = Field(
        default="",
        description="A server of the reward model for PPO's scores, and of tokenizer and decoder for its judge.",
    )
