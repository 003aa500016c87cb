"""Runs of one recording or of a folder of them: progress, files, reports. Imports torch by way of the API."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from editx.api import (
    SUFFIXES,
    Editor,
    Result,
    check_audio_target,
    make_request,
    read_source,
    save_audio,
    sidecar_text,
)
from editx.cli.remote import open_editor, target
from editx.remote import RemoteEditor
from shared.audio.io import Waveform, write_audio
from shared.errors import EditxError, UserError
from shared.files import check_target, make_folder
from shared.schemas import Edit, JobEvent, JobRequest

STDOUT = "-"
EXIT_PARTIAL = 5
AHEAD = 4
READABLE = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif"}


@dataclass(frozen=True)
class Settings:
    """What a run was asked for besides its edit."""

    checkpoint: str
    device: str
    seed: int | None
    n_best: int
    steps: int
    temperature: float | None
    iterations: int
    asr: bool
    picture: Path | None
    as_json: bool

    def request(self, edit: Edit, text: str | None) -> JobRequest:
        return make_request(
            edit, text, iterations=self.iterations, n_best=self.n_best, seed=self.seed, steps=self.steps,
            temperature=self.temperature,
        )  # fmt: skip


def run_one(
    source: Path | BinaryIO | Waveform, name: str, out: str, edit: Edit, text: str | None, settings: Settings
) -> int:
    """One recording to one result."""
    console = Console(stderr=True)
    if out == STDOUT and settings.as_json:
        raise UserError("Audio and JSON cannot share standard output.", "Give a file with --out.", "stdout_taken")
    _check_targets(source, out, settings.picture)
    recording = read_source(source)
    request = settings.request(edit, _text(source, recording, edit, text, settings))
    with open_editor(settings.checkpoint, settings.device) as editor:
        with _bar(console, settings) as progress:
            task = progress.add_task(f"{edit} · {name}", total=1.0)

            def show(event: JobEvent) -> None:
                progress.update(task, completed=event.progress)

            result = editor.run(recording, request, show)
        report = _deliver(result, name, out, edit, settings)
    _print(report, console, settings)
    return 0


def run_folder(folder: Path, out: str | None, edit: Edit, text: str | None, settings: Settings) -> int:
    """Every recording of a folder; a file that fails does not stop the others."""
    console = Console(stderr=True)
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in READABLE and path.is_file())
    if not files:
        raise UserError(f"There is no audio in {folder}.", f"Looked for {', '.join(sorted(READABLE))}.", "empty_folder")
    if out == STDOUT or (out is not None and Path(out).suffix.lower() in SUFFIXES):
        raise UserError("A batch needs a folder for its results.", "Give one with --out.", "batch_out")
    target = Path(out) if out else folder.with_name(f"{folder.resolve().name}-edited")
    if target.resolve() == folder.resolve():
        raise UserError(f"The results would overwrite the recordings in {folder}.", "Give another folder with --out.",
                        "same_place")  # fmt: skip
    make_folder(target)
    if settings.picture is not None:
        make_folder(settings.picture)
    names = _result_names(files)
    reports: list[dict[str, Any]] = []
    began = time.perf_counter()
    with open_editor(settings.checkpoint, settings.device) as editor, _bar(console, settings, count=True) as progress:
        task = progress.add_task(str(edit), total=len(files))
        for path, outcome in _in_flight(editor, files, edit, text, settings):
            reports.append(_finish(path, outcome, target / names[path], edit, settings))
            progress.advance(task)
    _print_summary(reports, target, time.perf_counter() - began, console, settings)
    return EXIT_PARTIAL if any("error" in report for report in reports) else 0


def _result_names(files: list[Path]) -> dict[Path, str]:
    """The results' file names: a.wav for a.mp3, and a.mp3.wav where two files differ in their suffix only."""
    stems = Counter(path.stem for path in files)
    return {path: f"{path.stem if stems[path.stem] == 1 else path.name}.wav" for path in files}


def _in_flight(
    editor: Editor | RemoteEditor, files: list[Path], edit: Edit, text: str | None, settings: Settings
) -> Iterator[tuple[Path, Result | EditxError]]:
    """The files' outcomes as they come, a few at once so that every model has something to do."""

    def one(path: Path) -> Result | EditxError:
        try:
            recording = read_source(path)
            said = text or _text(path, recording, edit, None, settings)
            return editor.run(recording, settings.request(edit, said))
        except EditxError as error:
            return error

    pool = ThreadPoolExecutor(AHEAD)
    waiting, running = iter(files), dict[Future[Result | EditxError], Path]()
    try:
        while True:
            for path in waiting:
                running[pool.submit(one, path)] = path
                if len(running) == AHEAD:
                    break
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(done), done.result()
    finally:
        editor.cancel_all()
        pool.shutdown(wait=False, cancel_futures=True)


def _finish(path: Path, outcome: Result | EditxError, target: Path, edit: Edit, settings: Settings) -> dict[str, Any]:
    try:
        if isinstance(outcome, EditxError):
            raise outcome
        return _deliver(outcome, path.name, str(target), edit, settings)
    except EditxError as error:
        return {"input": str(path), "error": error.document()}


def _text(source: object, recording: Waveform, edit: Edit, text: str | None, settings: Settings) -> str | None:
    """What is said: as given, from the sidecar file, or by speech recognition if that was allowed."""
    found = text or (sidecar_text(source) if isinstance(source, Path) else None)
    if found or not edit.needs_source_text or not settings.asr:
        return found
    from editx.asr import transcribe

    return transcribe(recording)


def _check_targets(source: object, out: str, picture: Path | None) -> None:
    """Refuse targets that cannot be written, and one that is the source itself, before any work is done."""
    if out != STDOUT:
        check_audio_target(Path(out))
        if isinstance(source, Path) and Path(out).resolve() == source.resolve():
            raise UserError(f"The result would overwrite {source}.", "Give another file with --out.", "same_place")
    if picture is not None and not picture.is_dir():
        check_target(picture)


def _deliver(result: Result, name: str, out: str, edit: Edit, settings: Settings) -> dict[str, Any]:
    """Write the result, its iterations and the picture; the report."""
    kept: list[str] = []
    if out == STDOUT:
        sys.stdout.buffer.write(write_audio(result.audio, None, "wav") or b"")
        sys.stdout.buffer.flush()
    else:
        path = Path(out)
        if len(result.iterations) > 1:
            for number, waveform in enumerate(result.iterations, 1):
                kept.append(str(save_audio(waveform, path.with_name(f"{path.stem}.iter{number}{path.suffix}"))))
        save_audio(result.audio, path)
    picture = _picture(result, name, edit, settings)
    return {
        "input": name,
        "output": out,
        "edit": edit.model_dump(exclude_none=True),
        "iterations": kept,
        "picture": picture,
        "seed": result.seed,
        "source_s": round(result.source.duration_s, 3),
        "output_s": round(result.audio.duration_s, 3),
        "seconds": round(result.seconds, 3),
        "rtf": round(result.rtf, 3),
        "checkpoint": gateway.url if (gateway := target()) else settings.checkpoint,
        "warnings": list(result.warnings),
        "steps": [timing.model_dump(exclude={"started_at"}) for timing in result.job.timings],
    }


def _picture(result: Result, name: str, edit: Edit, settings: Settings) -> str | None:
    if settings.picture is None:
        return None
    from editx.picture import draw

    target = settings.picture / f"{Path(name).stem}.png" if settings.picture.is_dir() else settings.picture
    rows = [(f"source: {name}", result.source)]
    rows += [(f"{edit}, iteration {number}", audio) for number, audio in enumerate(result.iterations, 1)]
    draw(rows, target)
    return str(target)


@contextmanager
def _bar(console: Console, settings: Settings, *, count: bool = False) -> Iterator[Progress]:
    numbers = MofNCompleteColumn() if count else TextColumn("{task.percentage:>3.0f} %")
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), numbers, TimeElapsedColumn())
    hidden = settings.as_json or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True) as progress:
        yield progress


def _print(report: dict[str, Any], console: Console, settings: Settings) -> None:
    for warning in report["warnings"]:
        console.print(f"[yellow]Warning:[/] {escape(warning)}", highlight=False)
    if settings.as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
        return
    where = "standard output" if report["output"] == STDOUT else report["output"]
    what = " ".join(str(value) for value in report["edit"].values())
    lines = [
        f"{what}: {report['input']} ({report['source_s']:.2f} s) -> {where} ({report['output_s']:.2f} s)",
        f"took {report['seconds']:.1f} s, RTF {report['rtf']:.2f}, seed {report['seed']}",
        *(f"kept {path}" for path in report["iterations"]),
        *([f"picture {report['picture']}"] if report["picture"] else []),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_summary(
    reports: list[dict[str, Any]], target: Path, seconds: float, console: Console, settings: Settings
) -> None:
    failed = [report for report in reports if "error" in report]
    done = [report for report in reports if "error" not in report]
    audio_s = sum(report["output_s"] for report in done)
    rtf = round(seconds / audio_s, 3) if audio_s else None
    if settings.as_json:
        summary = {"output": str(target), "seconds": round(seconds, 3), "output_s": round(audio_s, 3), "rtf": rtf}
        typer.echo(json.dumps({**summary, "done": done, "failed": failed}, ensure_ascii=False))
        return
    for warning in dict.fromkeys(warning for report in done for warning in report["warnings"]):
        console.print(f"[yellow]Warning:[/] {escape(warning)}", highlight=False)
    for report in failed:
        console.print(f"[red]{escape(report['input'])}:[/] {escape(report['error']['message'])}", highlight=False)
    lines = [
        f"{len(done)} of {len(reports)} recordings edited into {target}: {audio_s:.1f} s of audio",
        f"took {seconds:.1f} s" + (f", RTF {rtf:.2f}" if rtf is not None else ""),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
