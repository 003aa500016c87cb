"""PPO against the reward model, with a critic and a frozen reference (arXiv 2511.03601, stage three)."""

from services.trainer.ppo.config import PpoConfig
from services.trainer.ppo.trainer import PpoTrainer

__all__ = ["PpoConfig", "PpoTrainer"]
