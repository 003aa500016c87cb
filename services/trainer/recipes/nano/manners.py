"""Measure what each manner changes: `python -m services.trainer.recipes.nano.manners`.

Of the teacher's English readings, each beside a plain one of the same sentence and voice, the average change of F0, its
range, duration, level and voicing as the flow's encoder and the vocoder's F0 predictor read them off codes
(`shared.prosody`). `export` writes it into editx.json, where the choice among answers and the pace of the chosen
one look it up. Needs `codes`, `flow` or `heard`, and `vocoder`; a file that is there is left.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from services.trainer.recipes.nano import assets
from services.trainer.recipes.nano import flow as flows
from services.trainer.recipes.nano.codes import Coded, Item
from services.trainer.recipes.nano.run import last_trained, trained
from shared.codes import interleave
from shared.files import make_folder, write_atomically
from shared.models.recognizer import letters
from shared.models.spectral import SpectralConfig, SpectralVocoder
from shared.prosody import Floats, Prosody


def file() -> Path:
    """Where the changes are kept: a JSON object of manner to measures."""
    return assets.data_dir() / "runs" / "manners" / "changes.json"


def write(changes: dict[str, list[float]]) -> None:
    """Keep changes, in place of what is there. Raises UserError where they cannot be written."""
    make_folder(file().parent)
    write_atomically(file(), json.dumps(changes).encode())


def read() -> dict[str, list[float]]:
    """What was measured; empty where nothing was."""
    return dict(json.loads(file().read_text())) if file().exists() else {}


def prosody_of_runs() -> Prosody:
    """What measures codes, of the trained flow and vocoder."""
    vocoder = SpectralVocoder(SpectralConfig())
    trained("vocoder", "model", vocoder)
    flow = flows.averaged(last_trained("flow", "heard")).requires_grad_(False).eval()
    return Prosody(flow, vocoder.f0_predictor.requires_grad_(False).eval())


def average_changes(items: Iterable[Item], prosody: Prosody) -> dict[str, list[float]]:
    """What each manner changes of a plain reading on average (`shared.prosody.MEASURES`), by its name, of the
    English readings among items."""
    groups: dict[int, dict[str, Item]] = defaultdict(dict)
    for item in items:
        if letters(item["row"]["text"]):
            groups[item["row"]["group"]][item["row"]["manner"]] = item
    found: dict[str, list[Floats]] = defaultdict(list)
    for group in groups.values():
        if "neutral" in group and len(group) > 1:
            measures = dict(zip(group, prosody([interleave(*item["clean"]) for item in group.values()]), strict=True))
            for manner, measured in measures.items():
                if manner != "neutral":
                    found[manner].append(measured - measures["neutral"])
    return {manner: np.nanmean(found[manner], 0).round(3).tolist() for manner in sorted(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    if not file().exists():
        write(average_changes(Coded().items, prosody_of_runs()))
    print(f"manners: {len(read())} measured, in {file()}")


if __name__ == "__main__":
    main()
