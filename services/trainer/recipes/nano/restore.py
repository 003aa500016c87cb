"""Put a released checkpoint back into runs, to train its language model, flow, vocoder and recogniser on elsewhere:
`python -m services.trainer.recipes.nano.restore models/nano`.

The tokenizers stay as they are, since everything else was trained on their codes; `codes` and `plain` take them from
the checkpoint with `--checkpoint`. Optimizers start anew. A run that is there is left alone. What `words` and `heard`
made of `llm` and `flow` stands in their runs and in those that they start from: to train these on, remove the others.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from services.trainer.recipes.nano import assets, manners
from shared.checkpoints.layout import Checkpoint


def write_run(name: str, parts: dict[str, dict[str, Tensor]], step: int) -> None:
    """A run's state of weights alone, in float32, unless the run is there."""
    state = assets.data_dir() / "runs" / name / "state.pt"
    if state.exists():
        print(f"{name}: is there, at {state}")
        return
    state.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"parts": parts, "step": step, "rng": torch.get_rng_state()}, state)
    print(f"{name}: at step {step}")


def restore(root: str | Path) -> None:
    """Write the runs of a checkpoint of this recipe. Raises UserError for one that is not complete."""
    checkpoint = Checkpoint.resolve(root)
    metadata = json.loads((checkpoint.root / "editx.json").read_text())
    steps = metadata["steps"]
    text = assets.data_dir() / "runs" / "text" / "tokenizer.model"
    text.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(checkpoint.text_tokenizer_file, text)
    flow = _weights(checkpoint.flow_file)
    average = {f"module.{key}": value.clone() for key, value in flow.items()}
    language_model = {"model": _weights(checkpoint.step1_dir / "model.safetensors")}
    for name in ("llm", "words"):
        if steps.get(name):
            write_run(name, language_model, steps[name])
    for name in ("flow", "heard"):
        if steps.get(name):
            counted = average | {"n_averaged": torch.tensor(steps[name])}
            write_run(name, {"model": flow, "average": counted}, steps[name])
    if (changes := metadata.get("manners")) and not manners.file().exists():
        manners.write(changes)
    write_run("vocoder", {"model": _weights(checkpoint.vocoder_file)}, steps["vocoder"])
    if checkpoint.has_recognizer:
        write_run("recognizer", {"model": _weights(checkpoint.recognizer_file)}, steps["recognizer"])


def _weights(file: Path) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in load_file(file).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="models/nano, or another checkpoint that `export` wrote")
    restore(parser.parse_args().checkpoint)


if __name__ == "__main__":
    main()
