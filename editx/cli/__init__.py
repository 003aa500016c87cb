"""The command line. `main` is the entry point; the commands lie in modules that import torch only when they run.

Exit codes: 0 done; 1 the job failed, or a defect; 2 an argument, text, tag or recording that cannot be used; 3 a
checkpoint or package is missing or damaged; 4 something is unavailable for now; 5 some files of a batch failed; 6 the
result could not be written; 130 interrupted.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    from editx.cli.app import run

    sys.exit(run(sys.argv[1:]))
