"""Post-training of the small checkpoint, stage by stage: data, judges, SFT, preferences, reward, PPO, the table."""
