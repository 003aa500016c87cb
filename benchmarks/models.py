"""How fast every model is, at the official sizes with random weights: one table after another, each beside its
baseline.

    python -m benchmarks.models                                    # this machine's CPU, 2 cores: within 15 minutes
    python -m benchmarks.models --quick                            # every part at its smallest: does it run?
    python -m benchmarks.models --device cuda                      # a GPU
    python -m benchmarks.models --threads 1 --clock cpu            # on a machine that others use

The parts are modules of their own (`benchmarks.llm`, `benchmarks.tokenizer`, `benchmarks.decoder`) with more dials;
each runs in a process of its own, so that one part's memory is not another's. On a CPU the language model has 2 of its
32 layers, and the decoder makes 1.2 s of sound from 1.2 s of reference; every table's first line says so.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
ON_CPU = {"llm": "--layers 2 --runs 6", "tokenizer": "--runs 3", "decoder": "--reference 1.2 --seconds 1.2"}
ON_GPU = {
    "llm": "--layers 32 --kinds bfloat16 --batches 1 4 16 64",
    "tokenizer": "",
    "decoder": "--seconds 10 --runs 3",
}
QUICK = {
    "llm": "--layers 1 --runs 1 --contexts 64 --batches 1 2",
    "tokenizer": "--runs 1 --blocks 2 --seconds 2",
    "decoder": "--reference 0.24 --seconds 0.24 --batches 1 --steps 1",
}


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    shared = ["--device", given.device, "--threads", str(given.threads), "--clock", given.clock]
    parts = {"llm": shared, "tokenizer": ["--threads", str(given.threads)], "decoder": shared}
    sizes = QUICK if given.quick else ON_CPU if given.device == "cpu" else ON_GPU
    print(f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}", flush=True)
    for name, options in parts.items():
        print(f"\n## {name}\n", flush=True)
        began = time.perf_counter()
        command = [sys.executable, "-m", f"benchmarks.{name}", *options, *sizes[name].split()]
        subprocess.run(command, cwd=ROOT, check=True)
        print(f"\n`{' '.join(command[1:])}` took {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
