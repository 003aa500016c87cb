"""Checkpoints in the published layout: find, fetch, check and load them."""

from shared.checkpoints.layout import Checkpoint, InvalidCheckpoint, Metadata, MissingCheckpoint, TrainedOn

__all__ = ["Checkpoint", "InvalidCheckpoint", "Metadata", "MissingCheckpoint", "TrainedOn"]
