"""How long a speech request waits for its first audio, in this process: `python -m benchmarks.first_audio`.

The request is a clone of a bundled recording, as POST /v1/audio/speech carries it out; the clock runs from the
submission of the recording's samples to the first samples of the answer. Models are loaded and warm. A new voice has
to be tokenised first; a known one is answered from the tokenizer's memory. Prints Markdown: the medians of some calls,
and where the time of the first audio goes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from editx.embedded import Embedded
from editx.serving import embedded_backend
from services.gateway.backend import Backend
from services.gateway.settings import GatewaySettings
from services.gateway.speech import SAMPLE_RATE_HZ, Words, speak
from shared.audio.io import Waveform, read_audio
from shared.checkpoints.layout import Checkpoint
from shared.inference.port import Inference, Tensors

REFERENCE = Path(__file__).parents[1] / "tests/data/audio/en_happy_prompt.wav"
TEXT = "The train leaves at seven in the morning."
LOUDER = 1e-4  # of full scale a step: another recording to the tokenizer, the same voice to everybody else


@dataclass(frozen=True)
class Call:
    """One answer; times in seconds from its submission."""

    first_audio_s: float
    first_piece_s: float  # of sound
    longest_gap_s: float  # that a player would have stood still after the first audio
    whole_s: float
    audio_s: float
    stages: dict[str, float]  # until the first audio


class Stopwatch:
    """An Inference that adds up, by model, how long its caller waited for answers."""

    def __init__(self, inner: Inference) -> None:
        self._inner, self.waited_s = inner, dict.fromkeys(("tokenizer", "llm", "decoder"), 0.0)

    def infer(self, model: str, inputs: Tensors, **how: object) -> Tensors:
        began = time.perf_counter()
        try:
            return self._inner.infer(model, inputs, **how)  # type: ignore[arg-type]
        finally:
            self.waited_s[model] += time.perf_counter() - began

    def stream(self, model: str, inputs: Tensors, **how: object) -> Iterator[Tensors]:
        pieces = self._inner.stream(model, inputs, **how)  # type: ignore[arg-type]
        while True:
            began = time.perf_counter()
            piece = next(pieces, None)
            self.waited_s[model] += time.perf_counter() - began
            if piece is None:
                return
            yield piece

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


def call(backend: Backend, reference: Waveform, said: str, text: str, seed: int, steps: int) -> Call:
    """One speech request, read to its end."""
    watch = Stopwatch(backend.inference)
    watched = Backend(backend.bus, backend.store, backend.jobs, watch, backend.metadata, backend.encode)  # type: ignore[arg-type]
    began = time.perf_counter()
    pieces = speak(watched, Words(text, reference, said, seed, steps=steps), lambda: False)
    piece = next(pieces)
    first_s, first_piece_s = time.perf_counter() - began, len(piece) / SAMPLE_RATE_HZ
    stages = dict(watch.waited_s)
    audio_s, gap_s = first_piece_s, 0.0
    for piece in pieces:
        gap_s = max(gap_s, time.perf_counter() - began - first_s - audio_s)
        audio_s += len(piece) / SAMPLE_RATE_HZ
    return Call(first_s, first_piece_s, gap_s, time.perf_counter() - began, audio_s, stages)


def measure(system: Embedded, *, calls: int, steps: int = 10, text: str = TEXT) -> dict[str, dict[str, float]]:
    """Medians over some calls with new voices and with a known one; a first call of each kind does not count."""
    said = REFERENCE.with_suffix(".txt").read_text(encoding="utf-8").strip()
    known = read_audio(REFERENCE)
    backend = embedded_backend(system, GatewaySettings())
    found: dict[str, list[Call]] = {"a new voice": [], "a known voice": []}
    for number in range(calls + 1):
        louder = np.asarray(known.samples * (1 - LOUDER * (number + 1)), np.float32)
        found["a new voice"].append(call(backend, Waveform(louder, known.sample_rate_hz), said, text, number, steps))
        found["a known voice"].append(call(backend, known, said, text, number, steps))
    return {name: medians(ones[1:]) for name, ones in found.items()}


def medians(calls: list[Call]) -> dict[str, float]:
    """The columns of the table."""
    middle = {
        "first audio s": statistics.median(one.first_audio_s for one in calls),
        "slowest s": max(one.first_audio_s for one in calls),
    }
    for stage in calls[0].stages:
        middle[f"{stage} s"] = statistics.median(one.stages[stage] for one in calls)
    middle["of sound s"] = statistics.median(one.first_piece_s for one in calls)
    middle["longest gap s"] = max(one.longest_gap_s for one in calls)
    middle["RTF"] = sum(one.whole_s for one in calls) / sum(one.audio_s for one in calls)
    return middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="nano")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calls", type=int, default=5, help="of each kind, after one that does not count")
    parser.add_argument("--steps", type=int, default=10, help="of the flow")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with Embedded(Checkpoint.resolve(given.checkpoint), device=given.device) as system:
        rows = measure(system, calls=given.calls, steps=given.steps)
    print(f"{given.checkpoint}, {given.device}, {given.threads} threads, {given.steps} steps, {given.calls} calls\n")
    columns = list(next(iter(rows.values())))
    print("| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[column]:.2f}" for column in columns) + " |")


if __name__ == "__main__":
    main()
