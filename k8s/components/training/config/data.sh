# The sets that the trainings start from. What is there is not made again: an evicted pod goes on.
set -eu
if [ ! -d datasets/sft-train ]; then
  editx data build /etc/editx/data.yaml --out datasets
  editx data split datasets/sft --out datasets
fi
if [ ! -d datasets/prompts-train ]; then
  editx data build /etc/editx/prompts.yaml --out datasets
  editx data split datasets/prompts --out datasets
fi
editx eval make-benchmark recordings/held-out.jsonl recordings/texts.jsonl --out benchmark
editx data check datasets/sft-train --against datasets/sft-held-out --against benchmark/cases.jsonl
editx data check datasets/prompts-train --against datasets/prompts-held-out --against benchmark/cases.jsonl
