"""The rules between the parts hold: who may import whom, and what the command line loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("shared", "services", "editx")
SERVERS = {
    "kafka": {"shared/bus/kafka.py"},
    "minio": {"shared/store/s3.py"},
    "redis": {"shared/jobs/redis.py", "shared/jobs/quota_redis.py"},
    "tritonclient": {"shared/inference/triton.py"},
}
GATEWAY = "services/gateway/"
WEB = ("fastapi", "starlette", "sse_starlette")


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def tops(tree: ast.Module) -> set[str]:
    return {name.split(".")[0] for name in imported(tree)}


@pytest.mark.parametrize("server", sorted(SERVERS))
def test_a_servers_client_is_imported_by_its_adapter_alone(server: str) -> None:
    found = {path for path, tree in modules() if server in tops(tree) and not path.startswith(GATEWAY)}
    assert found <= SERVERS[server]


def test_the_web_framework_is_imported_by_the_gateway_alone() -> None:
    assert [path for path, tree in modules() if tops(tree) & set(WEB) and not path.startswith(GATEWAY)] == []


def test_models_import_torch_and_the_standard_library_alone() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "shared"}
    for path, tree in modules():
        if path.startswith("shared/models/"):
            assert tops(tree) <= allowed, path
            ours = {name for name in imported(tree) if name.startswith("shared")}
            assert {name for name in ours if not name.startswith("shared.models")} == set(), path


def test_shared_imports_no_service_and_a_service_no_other() -> None:
    for path, tree in modules():
        names = {name for name in imported(tree) if name.split(".")[0] in ("services", "editx")}
        if path.startswith("shared/"):
            assert names == set(), path
        elif path.startswith("services/") and path.count("/") > 1:
            mine = f"services.{path.split('/')[1]}"
            assert {name for name in names if not name.startswith(mine) and name != "services"} == set(), path


def test_handlers_know_no_bus_store_or_server() -> None:
    for path, tree in modules():
        if path.endswith("/handler.py"):
            banned = ("shared.bus", "shared.store", "shared.jobs", "shared.worker", "shared.wiring")
            assert {name for name in imported(tree) if name.startswith(banned)} == set(), path


def test_every_module_says_what_it_is() -> None:
    silent = [path for path, tree in modules() if tree.body and ast.get_docstring(tree) is None]
    assert silent == []


def test_the_import_linter_agrees() -> None:
    from importlinter.cli import lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_the_command_lines_help_loads_no_torch_and_importing_editx_loads_nothing_large() -> None:
    large = ("torch", "numpy", "onnxruntime", "soundfile", "matplotlib", "scipy")
    probe = (
        "import sys, editx, editx.cli\n"
        "from editx.cli.app import run\n"
        "code = run(['--help'])\n"
        f"print([name for name in {large} if name in sys.modules], code)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"
