"""How fast every model is, at the official sizes with random weights: one table after another, each beside its
baseline.

    python -m benchmarks.models                                    # this machine's CPU
    python -m benchmarks.models --device cuda                      # a GPU
    python -m benchmarks.models --threads 1 --clock cpu            # on a machine that others use

The parts are modules of their own (`benchmarks.llm`, `benchmarks.tokenizer`, `benchmarks.decoder`) with more dials;
each runs in a process of its own, so that one part's memory is not another's.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
    given = parser.parse_args()
    shared = ["--device", given.device, "--threads", str(given.threads), "--clock", given.clock]
    parts = {"llm": shared, "tokenizer": ["--threads", str(given.threads)], "decoder": shared}
    print(f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}", flush=True)
    for name, options in parts.items():
        print(f"\n## {name}\n", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
