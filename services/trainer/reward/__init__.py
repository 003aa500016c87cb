"""The reward model: a score per audio token, trained on pairs (arXiv 2511.03601, stage two)."""

from services.trainer.reward.trainer import RewardConfig, RewardTrainer

__all__ = ["RewardConfig", "RewardTrainer"]
