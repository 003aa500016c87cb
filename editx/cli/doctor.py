"""`editx doctor`: whether this machine and a checkpoint have what editx needs, and what to do about what they lack."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from editx.cli import options

EXIT_MISSING = 3
NEEDED = {"torch": "torch", "onnxruntime": "onnxruntime", "soundfile": "soundfile", "sentencepiece": "sentencepiece"}
OPTIONAL = {"matplotlib": "picture", "faster_whisper": "asr", "kafka": "stack", "minio": "stack", "redis": "stack"}
FREE_MIB_MIN = 256


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: str
    ok: bool
    hint: str = ""


def doctor(checkpoint: options.CheckpointOption = "nano", as_json: options.JsonOption = False) -> int:
    """Check this machine, the packages and a checkpoint."""
    findings = [*_machine(), *_packages(), *_checkpoint(checkpoint)]
    ok = all(finding.ok for finding in findings)
    if as_json:
        typer.echo(json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]}, ensure_ascii=False))
    else:
        table = Table("", "", "state", "what to do")
        for finding in findings:
            mark = "[green]ok[/]" if finding.ok else "[red]no[/]"
            table.add_row(mark, *map(escape, (finding.what, finding.state, finding.hint)))
        Console().print(table)
    return 0 if ok else EXIT_MISSING


def _machine() -> Iterator[Finding]:
    yield Finding("Python", platform.python_version(), ok=True)
    yield Finding("cores", str(os.cpu_count()), ok=True)
    free = shutil.disk_usage(tempfile.gettempdir()).free // (1 << 20)
    hint = "" if free >= FREE_MIB_MIN else "Free some space: jobs keep their artifacts there."
    yield Finding("temporary folder", f"{free} MiB free", free >= FREE_MIB_MIN, hint)


def _packages() -> Iterator[Finding]:
    for module, package in NEEDED.items():
        found = importlib.util.find_spec(module) is not None
        hint = "" if found else f"pip install {package}"
        yield Finding(package, metadata.version(package) if found else "missing", found, hint)
    for module, extra in OPTIONAL.items():
        found = importlib.util.find_spec(module) is not None
        hint = "" if found else f"Only for some uses: pip install editx[{extra}]"
        yield Finding(module, "installed" if found else "not installed (optional)", ok=True, hint=hint)
    if importlib.util.find_spec("torch") is not None:
        import torch

        gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
        yield Finding("GPU", gpu, ok=True, hint="" if gpu == "none" else "Use it with --device cuda.")


def _checkpoint(name: str) -> Iterator[Finding]:
    from shared.checkpoints.layout import Checkpoint
    from shared.errors import EditxError

    try:
        checkpoint = Checkpoint.resolve(name)
    except EditxError as error:
        yield Finding(f"checkpoint {name}", "not found", ok=False, hint=error.hint)
        return
    yield Finding(f"checkpoint {name}", str(checkpoint.root), ok=True)
    if importlib.util.find_spec("torch") is None:
        return
    from shared.checkpoints.verify import verify

    for part in verify(checkpoint, hashes=False).components:
        if part.ok:
            yield Finding(part.name, "in order", ok=True)
        else:
            first = part.findings[0]
            hint = f"{first.what}: {first.detail}; `editx checkpoint verify {name}` lists all."
            yield Finding(part.name, first.problem, ok=False, hint=hint)
