"""The whole recipe of the small checkpoint, in order: `make nano`, or `python -m services.trainer.recipes.nano`.

Every step is a module of its own, resumable and bounded; a step that is done is skipped by what it left. On a GPU
each step fits into ten minutes; `--minutes` bounds them anywhere, and the next call goes on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from services.trainer.recipes.nano.run import TRAINED

ROOT = Path(__file__).parents[4]
PACKAGE = "services.trainer.recipes.nano"


def plan(hours: float, minutes: float | None, target: Path) -> list[tuple[str, Sequence[str]]]:
    """The modules in order with their arguments."""
    bound = [] if minutes is None else ["--minutes", str(minutes)]
    steps: list[tuple[str, Sequence[str]]] = [
        ("assets", []),
        ("corpus", ["--hours", str(hours)]),
        ("volume", ["--hours", str(hours)]),
        ("features", ["--partial"]),
        ("text_tokenizer", []),
    ]
    for name in TRAINED:
        if name == "flow":
            steps += [("codes", []), ("perturbed", []), ("sounds", []), ("plain", []), ("mels", [])]
        steps.append((name, bound))
    return [*steps, ("manners", []), ("export", [str(target)])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=4.0, help="of the teacher's speech, and as many of cheap speech")
    parser.add_argument("--minutes", type=float, help="bound of each training step")
    parser.add_argument("--target", type=Path, default=ROOT / "models" / "nano")
    parser.add_argument("--only", help="one step, by name")
    arguments = parser.parse_args()
    for name, options in plan(arguments.hours, arguments.minutes, arguments.target):
        if arguments.only in (None, name):
            print(f"== {name}", flush=True)
            subprocess.run([sys.executable, "-m", f"{PACKAGE}.{name}", *options], check=True)


if __name__ == "__main__":
    main()
