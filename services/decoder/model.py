"""The model "decoder": audio tokens and a reference to a waveform, a batch of requests at a time or as a stream.

Runs in process and behind a model server alike. Knows nothing about jobs, artifacts or where tokens come from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from services.decoder.settings import DecoderSettings
from services.decoder.streaming import (
    Audio,
    Session,
    Sessions,
    Voice,
    Voices,
    loudest_part,
    stretch_prompt_mel,
    stretched,
    token_pairs,
)
from shared import telemetry
from shared.checkpoints.decoder import load_flow, load_vocoder
from shared.checkpoints.layout import Checkpoint
from shared.checkpoints.weights import default_dtype
from shared.codes import Codes, duration_s
from shared.errors import UserError
from shared.inference.port import (
    DeadlineExceeded,
    InferenceRequest,
    InferenceUnavailable,
    RequestCancelled,
    Tensors,
)
from shared.models.flow import flow_noise
from shared.settings import from_environment

MAX_STEPS, MAX_CFG, MAX_SEED = 1000, 100.0, 2**63
STRETCHES = (0.5, 2.0)


@dataclass(frozen=True, eq=False)
class _Job:
    """One request after the checks."""

    pairs: Tensor  # (P + T, 2), those of the reference first
    voice: Voice
    steps: int
    cfg_rate: float
    seed: int
    stretch: float
    request: InferenceRequest


class DecoderModel:
    """Inputs `mixed` int (n,), `prompt_mixed` int (p,), `prompt_mel` float32 (frames, 80), `speaker_embedding` (192,).

    Parameters, all optional: `steps` (10), `cfg` (the checkpoint's), `seed` (0). Output `audio` float32 (samples,) at
    24 kHz, 960 samples per semantic token. The same request gives the same audio alone and in any batch, within float
    tolerance. `stage_s` holds the seconds of the last batch by stage.
    """

    name = "decoder"

    def __init__(
        self, checkpoint: Checkpoint, *, device: str | None = None, settings: DecoderSettings | None = None
    ) -> None:
        """Load the checkpoint's flow and vocoder. `device` overrules the settings'."""
        self.settings = settings = settings or from_environment(DecoderSettings)
        self.device = torch.device(device or settings.device)
        self.flow = load_flow(checkpoint, dtype=_flow_dtype(settings.dtype, self.device), device=self.device)
        self.vocoder = load_vocoder(checkpoint, dtype=getattr(torch, settings.vocoder_dtype), device=self.device)
        self.voices = Voices(self.flow, settings.voice_cache_mb * 2**20)
        self.sessions = Sessions(limit=settings.max_sessions, idle_s=settings.session_idle_s)
        self.stage_s: dict[str, float] = {}

    def infer(self, requests: Sequence[InferenceRequest]) -> list[Tensors | Exception]:
        """One answer per request, in order; a request that fails does not touch the others."""
        self.stage_s = {}
        answers: list[Tensors | Exception | None] = [None] * len(requests)
        jobs: dict[int, _Job] = {}
        for index, request in enumerate(requests):
            try:
                _refuse(request)
                jobs[index] = self._check(request)
            except Exception as error:
                answers[index] = error
        sizes = {index: self._frames(job) for index, job in jobs.items()}
        for batch in _batches(sizes, lambda index: (jobs[index].steps, jobs[index].cfg_rate), self.settings):
            for index, answer in zip(batch, self._compute_each([jobs[index] for index in batch]), strict=True):
                answers[index] = answer
        return [answer for answer in answers if answer is not None]

    def stream(self, request: InferenceRequest) -> Iterator[Tensors]:
        """Audio in pieces, each as soon as it is certain.

        With the parameters `session`, `index` and `last`, the request is one chunk of a stream: chunk 0 opens it and
        carries the reference, later chunks carry `mixed` alone. Without `session` the whole request is streamed.
        """
        parameters = request.parameters
        if "session" not in parameters:
            job = self._check(request)
            yield from _pieces(self._open(job).feed(_codes("mixed", request), last=True), request)
            return
        name, index = str(parameters["session"]), int(parameters.get("index", 0))
        last = str(parameters.get("last", False)).lower() in ("1", "true")
        mixed = _codes("mixed", request)
        pieces = self.sessions.feed(
            name, index, mixed, last=last, open_session=lambda: self._open(self._check(request))
        )
        yield from _pieces(pieces, request)

    def _open(self, job: _Job) -> Session:
        return Session(
            partial(self.voices.read, job.voice, steps=job.steps, cfg_rate=job.cfg_rate),
            self.vocoder,
            chunk_tokens=self.settings.chunk_tokens,
            seed=job.seed,
        )

    def _check(self, request: InferenceRequest) -> _Job:
        mixed, prompt = _codes("mixed", request), _codes("prompt_mixed", request)
        mel, speaker = _floats("prompt_mel", request), _floats("speaker_embedding", request).reshape(-1)
        sizes, limit_s = self.flow.config, self.settings.max_duration_s
        if mel.ndim != 2 or mel.shape[1] != sizes.output_size or (len(prompt) and not len(mel)):
            raise UserError(f"prompt_mel has the shape {tuple(mel.shape)}.", f"Send (frames, {sizes.output_size}).")
        if len(speaker) != sizes.spk_embed_dim:
            raise UserError(f"speaker_embedding has {len(speaker)} values.", f"Send {sizes.spk_embed_dim}.")
        if (seconds := duration_s(mixed) + duration_s(prompt)) > limit_s:
            raise UserError(f"Reference and result together last {seconds:.0f} s; the limit is {limit_s:.0f} s.",
                            "Shorten the reference, or cut the text.", "too_long")  # fmt: skip
        if not len(mixed):
            raise UserError("There are no audio tokens to decode.", "Send at least one group of five.", "no_tokens")
        reference = token_pairs(prompt).to(self.device)
        fitted = stretch_prompt_mel(mel.to(self.device), len(reference), self.flow.frames_per_token)
        if sizes.longest_reference is not None:
            reference, fitted = loudest_part(reference, fitted, sizes.longest_reference)
        return _Job(
            torch.cat([reference, token_pairs(mixed).to(self.device)]),
            Voice(reference, fitted, speaker.to(self.device)),
            int(_number(request, "steps", 10, 1, MAX_STEPS)),
            _number(request, "cfg", self.flow.config.cfg_rate, 0, MAX_CFG),
            int(_number(request, "seed", 0, 0, MAX_SEED)),
            _number(request, "stretch", 1.0, *STRETCHES),
            request,
        )

    def _frames(self, job: _Job) -> int:
        return len(job.pairs) * self.flow.frames_per_token

    def _compute_each(self, jobs: list[_Job]) -> Sequence[Tensors | Exception]:
        """All together; where that fails and there are several, one by one, so that only the culprit fails."""
        try:
            return self._compute(jobs)
        except torch.OutOfMemoryError as error:
            failure: Exception = InferenceUnavailable(f"The decoder ran out of memory ({error}).",
                                                      "Lower EDITX_DECODER_BATCH_FRAMES.")  # fmt: skip
        except Exception as error:
            failure = error
        if len(jobs) == 1:
            return [failure]
        return [self._compute_each([job])[0] for job in jobs]

    @torch.inference_mode()
    def _compute(self, jobs: list[_Job]) -> list[Tensors]:
        rate, device = self.flow.frames_per_token, self.device
        lengths = torch.tensor([len(job.pairs) for job in jobs], device=device)
        prompts = torch.tensor([len(job.voice.mel) for job in jobs], device=device)
        with self._stage("flow"):
            mels = self.flow.sample(
                pad_sequence([job.pairs for job in jobs], batch_first=True),
                lengths,
                pad_sequence([job.voice.mel for job in jobs], batch_first=True),
                prompts,
                torch.stack([job.voice.speaker for job in jobs]),
                pad_sequence([flow_noise(job.seed, self._frames(job)) for job in jobs], batch_first=True).to(device),
                steps=jobs[0].steps,
                cfg_rate=jobs[0].cfg_rate,
                before_step=partial(_refuse_all, [job.request for job in jobs]),
            )
        counts = lengths * rate - prompts
        made = [
            stretched(mel[start : start + count], job.stretch)
            for mel, start, count, job in zip(mels, prompts, counts, jobs, strict=True)
        ]
        counts = torch.tensor([len(mel) for mel in made], device=device)
        with self._stage("vocoder"):
            mel = pad_sequence(made, batch_first=True).transpose(1, 2)
            waves = self.vocoder(mel, counts, [job.seed for job in jobs]).float().cpu().numpy()
        hop = self.vocoder.hop
        return [{"audio": wave[: count * hop]} for wave, count in zip(waves, counts.tolist(), strict=True)]

    @contextmanager
    def _stage(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        with telemetry.span(f"decoder.{stage}"):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        self.stage_s[stage] = self.stage_s.get(stage, 0.0) + time.perf_counter() - began


def _flow_dtype(choice: str, device: torch.device) -> torch.dtype:
    if choice != "auto":
        return getattr(torch, choice)  # type: ignore[no-any-return]
    return default_dtype(device)


def _batches(
    sizes: Mapping[int, int], alike: Callable[[int], object], settings: DecoderSettings
) -> Iterator[list[int]]:
    """Requests that run together: of one kind and similar size (in frames), within the limit of frames."""
    batch: list[int] = []
    for index in sorted(sizes, key=lambda index: (repr(alike(index)), sizes[index])):
        fits = bool(batch) and alike(index) == alike(batch[0])
        fits = fits and sizes[index] * (len(batch) + 1) <= settings.batch_frames
        fits = fits and sizes[batch[0]] >= sizes[index] * (1 - settings.padding_share)
        if batch and not fits:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _pieces(audio: Iterator[Audio], request: InferenceRequest) -> Iterator[Tensors]:
    for piece in audio:
        _refuse(request)
        yield {"audio": piece}


def _refuse(request: InferenceRequest) -> None:
    """Raise RequestCancelled or DeadlineExceeded where nobody waits for the answer any more."""
    if request.cancelled():
        raise RequestCancelled("The request was cancelled.")
    if request.deadline is not None and time.monotonic() > request.deadline:
        raise DeadlineExceeded("The deadline passed before the decoder was done.")


def _refuse_all(requests: Sequence[InferenceRequest]) -> None:
    """Raise as `_refuse` does where that is true of every request: one that is still wanted keeps a batch going."""
    for request in requests:
        try:
            _refuse(request)
        except (RequestCancelled, DeadlineExceeded):
            continue
        return
    _refuse(requests[0])


def _input(name: str, request: InferenceRequest, kinds: str) -> npt.NDArray[Any]:
    if name not in request.inputs:
        raise UserError(f"The decoder got no {name!r}.", "Send mixed, prompt_mixed, prompt_mel and speaker_embedding.")
    array = request.inputs[name]
    if array.size and array.dtype.kind not in kinds:
        raise UserError(f"{name} is {array.dtype}.", f"Send {'integers' if kinds == 'iu' else 'floats'}.")
    return array


def _codes(name: str, request: InferenceRequest) -> Codes:
    return _input(name, request, "iu").reshape(-1).astype(np.int32)


def _floats(name: str, request: InferenceRequest) -> Tensor:
    array = _input(name, request, "f").astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{name} holds values that are no numbers.", "Make the reference again.")
    return torch.from_numpy(array)


def _number(request: InferenceRequest, name: str, default: float, low: float, high: float) -> float:
    value = request.parameters.get(name, default)
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise UserError(f"{name} is {value!r}.", f"Send a number from {low:g} to {high:g}.")
    return number
