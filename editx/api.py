"""editx in Python: edit and clone recordings in a few lines.

Everything runs in this process, through `editx.embedded`.
"""

from __future__ import annotations

import atexit
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from editx.embedded import Embedded, check_request
from shared.artifacts import Tokenized
from shared.audio.io import Waveform, check_samples, read_audio, write_audio
from shared.checkpoints.layout import Checkpoint
from shared.errors import EditxError, PermanentError, TransientError, UserError, reasons
from shared.files import check_target
from shared.inference.local import ModelFactory
from shared.inference.port import given
from shared.schemas import DecodeSettings, Edit, GenerateSettings, Job, JobEvent, JobRequest, JobState
from shared.schemas.edit import TAGGED, EditType
from shared.schemas.request import SEED_MAX
from shared.tags import check_tag

DECODED_RATE_HZ = 24_000
SUFFIXES = {".wav": "wav", ".flac": "flac", ".mp3": "mp3", ".opus": "opus", ".ogg": "opus"}

Source = str | Path | bytes | BinaryIO | Waveform | tuple[npt.NDArray[np.float32], int]
"""A recording: a file, its bytes, a binary stream, or samples in -1..1, mono or not, and their rate in Hz."""


class JobFailed(PermanentError):
    """The job ended without a result; `code` says why."""

    default_code = "job_failed"


class JobCancelled(EditxError):
    """The job was cancelled."""

    default_code = "cancelled"


@dataclass(frozen=True)
class Result:
    """What came of an edit or clone. `iterations` holds the audio of every iteration, the last one being `audio`."""

    iterations: tuple[Waveform, ...]
    source: Waveform
    job: Job
    seed: int
    seconds: float
    warnings: tuple[str, ...] = field(default=())

    @property
    def audio(self) -> Waveform:
        """The final recording, 24 kHz mono."""
        return self.iterations[-1]

    @property
    def rtf(self) -> float:
        """Processing seconds per second of audio made, over all iterations."""
        return self.seconds / sum(waveform.duration_s for waveform in self.iterations)

    def save(self, path: str | Path) -> Path:
        """Write the final recording as WAV, FLAC, MP3 or Opus, by the suffix; whole or not at all."""
        return save_audio(self.audio, Path(path))


class Editor:
    """A loaded checkpoint. Models load on first use and stay; `edit` and `clone` may be called by several threads."""

    def __init__(
        self,
        checkpoint: str | Path = "nano",
        *,
        device: str = "cpu",
        folder: Path | None = None,
        models: dict[str, ModelFactory] | None = None,
    ) -> None:
        self.checkpoint = Checkpoint.resolve(checkpoint)
        self.is_open = True
        self.system = Embedded(self.checkpoint, folder=folder, device=device, models=models).start()

    def edit(
        self,
        source: Source,
        *,
        text: str | None = None,
        emotion: str | None = None,
        style: str | None = None,
        speed: str | None = None,
        denoise: bool = False,
        vad: bool = False,
        paralinguistic: str | None = None,
        iterations: int = 1,
        n_best: int = 1,
        seed: int | None = None,
        steps: int = 10,
        temperature: float | None = None,
        on_event: Callable[[JobEvent], None] | None = None,
    ) -> Result:
        """Edit a recording once or several times over; exactly one kind of edit is named.

        `text` is what is said in it (not needed for denoise and vad); a file's sidecar .txt is read if it is not given.
        `paralinguistic` is the new text, with sounds such as [Laughter] between its words. Raises UserError, JobFailed.
        """
        wanted = edit_of(emotion, style, speed, denoise, vad, paralinguistic)
        request = make_request(
            wanted, text or sidecar_text(source), iterations=iterations, n_best=n_best, seed=seed, steps=steps,
            temperature=temperature,
        )  # fmt: skip
        return self.run(source, request, on_event)

    def clone(
        self,
        reference: Source,
        text: str,
        *,
        reference_text: str | None = None,
        n_best: int = 1,
        seed: int | None = None,
        steps: int = 10,
        temperature: float | None = None,
        on_event: Callable[[JobEvent], None] | None = None,
    ) -> Result:
        """Say `text` with the reference's voice; `reference_text` is what the reference says (or its sidecar .txt)."""
        wanted = make_edit("clone", target_text=text)
        request = make_request(
            wanted, reference_text or sidecar_text(reference), n_best=n_best, seed=seed, steps=steps,
            temperature=temperature,
        )  # fmt: skip
        return self.run(reference, request, on_event)

    def run(self, source: Source, request: JobRequest, on_event: Callable[[JobEvent], None] | None = None) -> Result:
        """Carry out a request and wait for it; an interrupt (Ctrl-C) cancels it first."""
        self._check_open()
        recording = read_source(source)
        check_request(request, self.checkpoint)
        began = time.perf_counter()
        job = self.system.submit(write_audio(recording, None, "wav") or b"", request)
        try:
            job = self.system.wait(job.id, on_event)
        except BaseException:
            self._give_up(job.id)
            raise
        raise_for(job)
        audio = tuple(read_audio(self.system.store.get(key)) for key in job.result_keys)
        warnings = (*self.checkpoint.metadata.warnings(request.edit), *told_by(job))
        return Result(audio, recording, job, request.seed, time.perf_counter() - began, warnings)

    def tokenize(self, source: Source) -> Tokenized:
        """The recording's linguistic and semantic codes, speaker embedding and reference mel."""
        self._check_open()
        recording = read_source(source)
        codes = self.system.inference.infer(
            "tokenizer",
            {"audio": recording.samples},
            parameters={"sample_rate_hz": recording.sample_rate_hz},
        )
        return Tokenized(
            codes["linguistic"], codes["semantic"], codes["speaker_embedding"], codes["prompt_mel"],
            recording.duration_s,
        )  # fmt: skip

    def decode(
        self,
        tokens: Tokenized,
        reference: Tokenized | None = None,
        *,
        steps: int = 10,
        seed: int = 0,
        cfg: float | None = None,
    ) -> Waveform:
        """The audio that tokens stand for, in the voice of the reference (their own, if there is none); 24 kHz."""
        self._check_open()
        voice = reference or tokens
        answer = self.system.inference.infer(
            "decoder",
            {
                "mixed": tokens.mixed,
                "prompt_mixed": voice.mixed,
                "prompt_mel": voice.prompt_mel,
                "speaker_embedding": voice.speaker_embedding,
            },
            parameters=given(steps=steps, cfg=cfg, seed=seed),
        )
        return Waveform(answer["audio"].astype(np.float32).reshape(-1), DECODED_RATE_HZ)

    def cancel_all(self) -> None:
        """Cancel every run that has not ended."""
        for job in self.system.jobs.list(states=(JobState.ACCEPTED, JobState.RUNNING), limit=100).jobs:
            self._give_up(job.id)

    def close(self) -> None:
        """Stop the workers and free the models. Safe to call twice."""
        self.is_open = False
        self.system.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self.is_open:
            raise UserError("The editor is closed.", "Make another one, or call load() again.", "editor_closed")

    def _give_up(self, job_id: str) -> None:
        try:
            self.system.cancel(job_id)
        except EditxError:
            return


def edit_of(
    emotion: str | None, style: str | None, speed: str | None, denoise: bool, vad: bool, paralinguistic: str | None
) -> Edit:
    """The one edit that is named. Raises UserError if none or several are, or for a tag or text that cannot be used."""
    wanted: dict[EditType, str | bool | None] = {
        "emotion": emotion,
        "style": style,
        "speed": speed,
        "denoise": denoise,
        "vad": vad,
        "paralinguistic": paralinguistic,
    }
    named = [kind for kind, value in wanted.items() if value]
    if len(named) != 1:
        found = ", ".join(named) or "none"
        raise UserError(
            f"Exactly one edit is needed, found {found}.",
            "Name one of emotion, style, speed, denoise, vad and paralinguistic; several edits are several runs.",
            "one_edit",
        )
    [kind] = named
    if kind in TAGGED:
        return make_edit(kind, detail=check_tag(kind, str(wanted[kind])))
    return make_edit(kind, target_text=paralinguistic or None)


def make_edit(kind: EditType, *, detail: str | None = None, target_text: str | None = None) -> Edit:
    """An edit. Raises UserError for a text that is blank or too long, and for what does not belong to this kind."""
    try:
        return Edit(type=kind, detail=detail, target_text=target_text)
    except ValidationError as error:
        raise UserError(f"The {kind} edit cannot be made: {reasons(error)}.", "", "invalid_request") from error


def make_request(
    edit: Edit,
    text: str | None,
    *,
    iterations: int = 1,
    n_best: int = 1,
    seed: int | None = None,
    steps: int = 10,
    temperature: float | None = None,
) -> JobRequest:
    """The request of an edit with the settings that people change. Without a seed it draws one. Raises UserError."""
    if edit.needs_source_text and not (text and text.strip()):
        raise UserError(
            f"What is said in the recording is needed for {edit}.",
            "Give the text, put it into a .txt file beside the recording, or let --asr write it down.",
            "missing_text",
        )
    try:
        request = JobRequest(
            edit=edit,
            text=text.strip() if text and edit.needs_source_text else None,
            iterations=iterations,
            n_best=n_best,
            seed=random.randrange(SEED_MAX) if seed is None else seed,
            generate=GenerateSettings(temperature=temperature),
            decode=DecodeSettings(steps=steps),
        )
    except ValidationError as error:
        raise UserError(f"The request does not hold together: {reasons(error)}.", "", "invalid_request") from error
    check_request(request)
    return request


def read_source(source: Source) -> Waveform:
    """The recording of any kind of source. Raises UserError for what is no usable recording."""
    if isinstance(source, tuple):
        samples, rate = source
        source = Waveform(_mono(np.asarray(samples)), int(rate))
    if isinstance(source, Waveform):
        check_samples(source.samples, source.sample_rate_hz, "The recording")
        return source
    return read_audio(source)


def _mono(samples: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Samples (n,), (n, channels) or (channels, n) to float32 (n,). Whole numbers are scaled by their type's range."""
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "fi":
        raise UserError(f"The samples are {samples.dtype} {samples.shape}.", "Give floats in -1..1, mono or stereo.",
                        "audio_unsupported")  # fmt: skip
    scale = -float(np.iinfo(samples.dtype).min) if samples.dtype.kind == "i" else 1.0
    mixed = samples.mean(axis=int(np.argmin(samples.shape))) if samples.ndim == 2 else samples
    return (mixed / scale).astype(np.float32)


def sidecar_text(source: Source) -> str | None:
    """The text in the .txt file beside a recording's file, if there is one."""
    if not isinstance(source, str | Path):
        return None
    path = Path(source).with_suffix(".txt")
    try:
        return path.read_text(encoding="utf-8").strip() or None if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"The transcript {path} cannot be read: {error}.", "Save it as UTF-8 text.", "bad_sidecar"
        ) from error


def save_audio(waveform: Waveform, path: Path) -> Path:
    """Write audio in the format that the suffix names; whole or not at all. Raises UserError."""
    write_audio(waveform, path, _format(path))
    return path


def check_audio_target(path: Path) -> None:
    """Raise UserError, before any work is done, where `save_audio` could not write."""
    _format(path)
    check_target(path)


def _format(path: Path) -> str:
    form = SUFFIXES.get(path.suffix.lower())
    if form is None:
        raise UserError(
            f"{path} has no suffix that says its format.", f"Use one of {', '.join(SUFFIXES)}.", "unknown_format"
        )
    return form


def raise_for(job: Job) -> None:
    """Raise JobCancelled, UserError, TransientError or JobFailed for a job that did not end well."""
    if job.state == JobState.CANCELLED:
        raise JobCancelled(f"The job {job.id} was cancelled.")
    if job.state == JobState.FAILED and job.error is not None:
        kind = TransientError if job.error.retryable else JobFailed if job.error.dead_letter else UserError
        raise kind(job.error.message, job.error.hint, job.error.code)


def told_by(job: Job) -> list[str]:
    """What the steps found odd about the result: every candidate of an iteration collapsed."""
    loops = any(timing.metrics.get("collapsed", 0) >= job.request.n_best for timing in job.timings)
    return ["The language model found no proper end: listen to the result, or try another seed."] if loops else []


_lock = threading.Lock()
_editors: dict[tuple[str, str], Editor] = {}


def load(checkpoint: str | Path = "nano", *, device: str = "cpu") -> Editor:
    """The editor of a checkpoint ("nano", another name, or a directory); the same one for the same arguments."""
    key = str(checkpoint), device
    with _lock:
        if key not in _editors or not _editors[key].is_open:
            _editors[key] = Editor(checkpoint, device=device)
            atexit.register(_editors[key].close)
        return _editors[key]


def edit(
    source: Source,
    *,
    checkpoint: str | Path = "nano",
    text: str | None = None,
    emotion: str | None = None,
    style: str | None = None,
    speed: str | None = None,
    denoise: bool = False,
    vad: bool = False,
    paralinguistic: str | None = None,
    iterations: int = 1,
    n_best: int = 1,
    seed: int | None = None,
    steps: int = 10,
    temperature: float | None = None,
) -> Result:
    """Edit a recording with a checkpoint; see Editor.edit.

    >>> edit("in.wav", text="Hello there.", emotion="happy").save("out.wav")  # doctest: +SKIP
    """
    return load(checkpoint).edit(
        source, text=text, emotion=emotion, style=style, speed=speed, denoise=denoise, vad=vad,
        paralinguistic=paralinguistic, iterations=iterations, n_best=n_best, seed=seed, steps=steps,
        temperature=temperature,
    )  # fmt: skip


def clone(
    reference: Source,
    text: str,
    *,
    checkpoint: str | Path = "nano",
    reference_text: str | None = None,
    n_best: int = 1,
    seed: int | None = None,
    steps: int = 10,
    temperature: float | None = None,
) -> Result:
    """Say a text with a reference's voice; see Editor.clone."""
    return load(checkpoint).clone(
        reference, text, reference_text=reference_text, n_best=n_best, seed=seed, steps=steps, temperature=temperature
    )
