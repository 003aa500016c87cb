"""The model "tokenizer": recordings to codes, speaker embedding and prompt mel, several requests at a time.

Runs in process and behind a model server alike. Knows nothing about jobs, artifacts or where recordings come from.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.tokenizer.settings import TokenizerSettings
from shared import telemetry
from shared.audio.features import prompt_mel
from shared.audio.io import check_samples
from shared.audio.signal import TrimSpan, cut, find_speech, limit_peak, normalize_peak, resample
from shared.checkpoints.layout import Checkpoint
from shared.checkpoints.tokenizer import RATE_HZ, load_linguistic, load_mel_config, load_semantic, load_speaker
from shared.errors import UserError
from shared.inference.port import InferenceRequest, InferenceUnavailable, Tensors
from shared.settings import from_environment
from shared.tallies import looked_up


@dataclass(frozen=True)
class _Recording:
    """One request after the checks: what is computed for it is decided by `key` alone."""

    samples: npt.NDArray[np.float32]
    sample_rate_hz: int
    trim_before_mel: bool
    key: bytes


@dataclass(frozen=True)
class _Prepared:
    """The three signals that the branches start from."""

    tokens: Tensor  # 16 kHz, peak 0.999, trimmed
    speaker: Tensor  # 16 kHz, whole
    mel: Tensor  # 24 kHz, whole, or trimmed where asked for


class TokenizerModel:
    """Inputs `audio` float32 (n,); parameters `sample_rate_hz`, `trim_before_mel` (optional).

    Outputs `linguistic` int32 (n2,), `semantic` int32 (n3,), `speaker_embedding` float32 (192,), `prompt_mel` float32
    (frames, 80). Repeated recordings are answered from memory. `stage_s` holds the seconds of the last batch by stage.
    """

    name = "tokenizer"

    def __init__(
        self, checkpoint: Checkpoint, *, device: str | None = None, settings: TokenizerSettings | None = None
    ) -> None:
        self.settings = settings = settings or from_environment(TokenizerSettings)
        threads, device = settings.onnx_threads, device or settings.device
        self.linguistic = load_linguistic(checkpoint, device=device, dtype=getattr(torch, settings.dtype))
        self.semantic = load_semantic(checkpoint, device=device, threads=threads)
        self.speaker = load_speaker(checkpoint, threads=threads)
        self.mel_config = load_mel_config(checkpoint)
        chosen = settings.trim_before_mel
        self.trim_before_mel = checkpoint.metadata.trim_before_mel if chosen is None else chosen
        self.stage_s: dict[str, float] = {}
        self._cache = _Cache(settings.cache_entries)

    def infer(self, requests: Sequence[InferenceRequest]) -> list[Tensors | Exception]:
        """One answer per request, in order; a request that fails does not touch the others."""
        self.stage_s = {}
        asked = [self._check(request) for request in requests]
        answers: dict[bytes, Tensors | Exception] = {}
        for recording in asked:
            if isinstance(recording, _Recording) and (known := self._cache.get(recording.key)) is not None:
                answers[recording.key] = known
        hits = sum(isinstance(item, _Recording) and item.key in answers for item in asked)
        looked_up("recordings", hits=hits, misses=sum(isinstance(item, _Recording) for item in asked) - hits)
        fresh = {item.key: item for item in asked if isinstance(item, _Recording) and item.key not in answers}
        for key, answer in zip(fresh, self._compute_each(list(fresh.values())), strict=True):
            answers[key] = answer
            if not isinstance(answer, Exception):
                self._cache.put(key, answer)
        return [answers[item.key] if isinstance(item, _Recording) else item for item in asked]

    def _check(self, request: InferenceRequest) -> _Recording | Exception:
        try:
            audio, rate = request.inputs["audio"], request.parameters["sample_rate_hz"]
            trims = request.parameters.get("trim_before_mel", self.trim_before_mel)
        except KeyError as error:
            return UserError(f"The tokenizer got no {error.args[0]!r}.",
                             "Send the input 'audio' and the parameter 'sample_rate_hz'.")  # fmt: skip
        if audio.ndim != 1 or audio.dtype.kind != "f":
            return UserError(f"The tokenizer's audio is {audio.dtype} {audio.shape}, not float (n,).",
                             "Send mono samples in [-1, 1].")  # fmt: skip
        samples = np.ascontiguousarray(audio, dtype=np.float32)
        try:
            check_samples(samples, int(rate), "The recording", max_duration_s=self.settings.max_duration_s)
        except UserError as error:
            return error
        trims = str(trims).lower() in ("1", "true")
        digest = hashlib.sha256(f"{int(rate)} {trims} ".encode())
        digest.update(samples.data)
        return _Recording(samples, int(rate), trims, digest.digest())

    def _compute_each(self, recordings: list[_Recording]) -> Sequence[Tensors | Exception]:
        """All together; where that fails and there are several, one by one, so that only the culprit fails."""
        try:
            return self._compute(recordings) if recordings else []
        except torch.OutOfMemoryError as error:
            failure: Exception = InferenceUnavailable(f"The tokenizer ran out of memory ({error}).",
                                                      "Send shorter recordings or fewer at once.")  # fmt: skip
        except Exception as error:
            failure = error
        if len(recordings) == 1:
            return [failure]
        return [self._compute_each([recording])[0] for recording in recordings]

    @torch.inference_mode()
    def _compute(self, recordings: list[_Recording]) -> list[Tensors]:
        with self._stage("prepare"):
            prepared = [self._prepare(recording) for recording in recordings]
        with self._stage("linguistic"):
            linguistic = self.linguistic.encode([item.tokens for item in prepared])
        with self._stage("semantic"):
            semantic = self.semantic.encode([item.tokens for item in prepared])
        with self._stage("speaker"):
            speaker = self.speaker.embed([item.speaker for item in prepared])
        with self._stage("mel"):
            mels = [prompt_mel(item.mel, config=self.mel_config).numpy() for item in prepared]
        names = ("linguistic", "semantic", "speaker_embedding", "prompt_mel")
        return [dict(zip(names, row, strict=True)) for row in zip(linguistic, semantic, speaker, mels, strict=True)]

    def _prepare(self, recording: _Recording) -> _Prepared:
        rate = recording.sample_rate_hz
        samples = limit_peak(torch.from_numpy(recording.samples))
        tokens = normalize_peak(resample(samples, rate, RATE_HZ, filter_dtype=torch.float64))
        span: TrimSpan = find_speech(tokens, RATE_HZ)
        mel = resample(samples, rate, self.mel_config.sampling_rate)
        if recording.trim_before_mel:
            mel = cut(mel, self.mel_config.sampling_rate, span)
        return _Prepared(cut(tokens, RATE_HZ, span), resample(samples, rate, RATE_HZ), mel)

    @contextmanager
    def _stage(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        with telemetry.span(f"tokenizer.{stage}"):
            yield
        self.stage_s[stage] = self.stage_s.get(stage, 0.0) + time.perf_counter() - began


class _Cache:
    """The most recently used answers by the hash of their recording. Any thread may call it."""

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._answers: OrderedDict[bytes, Tensors] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Tensors | None:
        with self._lock:
            if key not in self._answers:
                return None
            self._answers.move_to_end(key)
            return self._answers[key]

    def put(self, key: bytes, answer: Tensors) -> None:
        for array in answer.values():
            array.setflags(write=False)  # several callers may hold the same answer
        with self._lock:
            self._answers[key] = answer
            self._answers.move_to_end(key)
            while len(self._answers) > self._entries:
                self._answers.popitem(last=False)
