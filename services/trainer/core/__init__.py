"""What every training shares: objectives, schedules, batches, the loop, adapters and checkpoints."""
