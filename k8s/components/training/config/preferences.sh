# Preferences from the SFT model's answers to the prompts. Every step goes on where it stopped.
set -eu
for part in train held-out; do
  editx data candidates datasets/prompts-$part --checkpoint editx-sft --out answers/$part
  editx data judge answers/$part/candidates.jsonl --judge $PREFERENCE_JUDGE --out answers/$part/ratings.jsonl
  editx data build /etc/editx/preferences-$part.yaml --out datasets
done
