"""A worker process from its start to its end on SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROCESS = """
from shared.service import run_worker

class Handler:
    kind = "decode"
    def run(self, step):
        raise AssertionError

run_worker("decoder", lambda inference, settings: Handler(), {})
"""


def test_a_worker_starts_from_its_environment_tells_that_it_lives_and_drains_on_sigterm(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    settings = {
        "EDITX_BUS_URL": "memory:",
        "EDITX_STORE_URL": f"file://{tmp_path}/store",
        "EDITX_JOBS_URL": f"sqlite://{tmp_path}/jobs.sqlite",
        "EDITX_INFERENCE_URL": "local:",
        "EDITX_ALIVE_FILE": str(alive),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS], cwd=ROOT, env={**os.environ, **settings}, stderr=subprocess.PIPE
    )
    until = time.monotonic() + 30
    while not alive.exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0
    lines = [json.loads(line) for line in stderr.decode().splitlines()]
    assert any("draining" in line["message"] for line in lines)
