"""docs/api.md holds: its shell and Python examples run against a gateway, and what it names exists."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pydantic import TypeAdapter

from services.decoder.settings import DecoderSettings
from services.gateway.access import ApiKey
from services.gateway.settings import GatewaySettings
from tests.fixtures.gateways import Served, serving, wav

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def examples(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def documented(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tiny, tmp_path_factory.mktemp("documented")) as found:
        yield found


def here(text: str, served: Served) -> str:
    return (
        text.replace("http://localhost:8000", served.url).replace("localhost:8000", served.url).replace("nano", "tiny")
    )


def run(words: list[str], folder: Path) -> str:
    (folder / "in.wav").write_bytes(wav(2.0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("number", range(len(examples("bash"))))
def test_the_shell_examples_run(documented: Served, tmp_path: Path, number: int) -> None:
    told = run(["bash", "-euo", "pipefail", "-c", here(examples("bash")[number], documented)], tmp_path)
    assert '"code"' not in told, told
    for made in ("out.wav", "speech.mp3"):
        if made in examples("bash")[number]:
            assert (tmp_path / made).stat().st_size > 5_000


@pytest.mark.parametrize("number", range(len(examples("python"))))
def test_the_python_examples_run(documented: Served, tmp_path: Path, number: int) -> None:
    run([sys.executable, "-c", here(examples("python")[number], documented)], tmp_path)


def test_the_keys_file_of_the_document_is_a_keys_file() -> None:
    assert TypeAdapter(list[ApiKey]).validate_python(json.loads(examples("json")[0]))


def test_paths_and_settings_of_the_document_exist(documented: Served) -> None:
    known = set(httpx.get(f"{documented.url}/openapi.json").json()["paths"])
    named = re.findall(r"(?:GET|POST|DELETE) (/v1/[a-z/]+(?:\{id\}[a-z/]*)?)", DOCUMENT)
    assert len(named) >= 7
    for path in named:
        assert path in {re.sub(r"\{\w+\}", "{id}", one) for one in known}, path
    fields = {f"EDITX_{name.upper()}" for name in GatewaySettings.model_fields} | {"EDITX_URL", "EDITX_API_KEY"}
    fields |= {f"EDITX_DECODER_{name.upper()}" for name in DecoderSettings.model_fields}
    assert set(re.findall(r"EDITX_[A-Z_]+[A-Z]", DOCUMENT)) <= fields
