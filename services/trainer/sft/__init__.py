"""Supervised fine-tuning: one epoch on the assistant's audio tokens (arXiv 2511.03601, stage one)."""

from services.trainer.sft.trainer import SftConfig, SftTrainer

__all__ = ["SftConfig", "SftTrainer"]
