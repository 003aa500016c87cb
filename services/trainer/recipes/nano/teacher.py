"""The teacher of the small checkpoint: Kokoro-82M (Apache-2.0) with controls, the part a commercial cloning system
plays in the paper.

One graph, three additions: frames per phoneme (25 ms each) as an output, so every utterance carries its alignment;
and F0 range, F0 shift and energy as inputs, so one voice can say one sentence in several manners. A voice is a
256-dim style per phoneme count: the first half is timbre, the second prosody; convex mixes of voices are new
speakers. Knows nothing about datasets.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
from scipy.signal import lfilter

if TYPE_CHECKING:
    from services.trainer.recipes.nano.assets import Assets

SAMPLE_RATE_HZ = 24_000
PHONEME_FRAME_S = 0.025
TIMBRE = slice(0, 128)
PROSODY = slice(128, 256)
MAX_PHONEMES = 509
DURATIONS = "/encoder/Clip_output_0"


@dataclass(frozen=True)
class Manner:
    """How a sentence is said, relative to the voice's neutral reading. Factors for speed and F0, nats for energy."""

    speed: float = 1.0
    f0_range: float = 1.0
    f0_shift: float = 1.0
    energy: float = 0.0
    prosody_of: str | None = None
    whisper: bool = False
    formant: float = 1.0


WHISPERS_FROM = 0.5
"""A whisper is a whisper or a voice: below this strength it is a voice."""


def blend(manner: Manner, strength: float) -> Manner:
    """A manner between neutral (strength 0) and itself (1), or beyond."""
    return replace(
        manner, speed=manner.speed**strength, f0_range=manner.f0_range**strength, f0_shift=manner.f0_shift**strength,
        energy=manner.energy * strength, formant=manner.formant**strength,
        whisper=manner.whisper and strength >= WHISPERS_FROM,
    )  # fmt: skip


NEUTRAL = Manner()
EMOTIONS: dict[str, Manner] = {
    "happy": Manner(speed=1.08, f0_range=1.5, f0_shift=1.18, energy=0.2),
    "angry": Manner(speed=1.12, f0_range=1.35, f0_shift=1.06, energy=0.6),
    "sad": Manner(speed=0.82, f0_range=0.5, f0_shift=0.9, energy=-0.5),
    "fear": Manner(speed=1.18, f0_range=0.7, f0_shift=1.25, energy=-0.2),
    "surprised": Manner(speed=0.98, f0_range=2.0, f0_shift=1.25, energy=0.2),
    "excited": Manner(speed=1.15, f0_range=1.8, f0_shift=1.28, energy=0.4),
    "depressed": Manner(speed=0.75, f0_range=0.3, f0_shift=0.86, energy=-0.6),
    "coldness": Manner(speed=1.0, f0_range=0.35, f0_shift=0.96, energy=-0.2),
}
STYLES: dict[str, Manner] = {
    "whisper": Manner(speed=0.92, whisper=True),
    "gentle": Manner(speed=0.88, f0_range=0.8, f0_shift=1.03, energy=-0.45),
    "serious": Manner(speed=0.93, f0_range=0.6, f0_shift=0.92, energy=0.1),
    "exaggerated": Manner(speed=0.92, f0_range=2.3, f0_shift=1.1, energy=0.3),
    "child": Manner(speed=1.02, f0_range=1.2, f0_shift=1.2, formant=1.18),
    "older": Manner(speed=0.78, f0_range=0.8, f0_shift=0.9, energy=-0.2, formant=0.95),
}
SPEEDS: dict[str, Manner] = {
    "faster": Manner(speed=1.25),
    "slower": Manner(speed=0.8),
    "more faster": Manner(speed=1.5),
    "more slower": Manner(speed=0.65),
}
MANNERS: dict[str, Manner] = {
    "neutral": NEUTRAL,
    **{f"emotion/{name}": manner for name, manner in EMOTIONS.items()},
    **{f"style/{name}": manner for name, manner in STYLES.items()},
    **{f"speed/{name}": manner for name, manner in SPEEDS.items()},
}


@dataclass(frozen=True)
class Spoken:
    """A rendering: 24 kHz float32 audio (n,), the phonemes and their frames of 25 ms (the ends included as
    phoneme 0)."""

    audio: np.ndarray
    phoneme_ids: list[int]
    frames: list[int]


def add_controls(source: Path, target: Path) -> Path:
    """Write the graph with the three additions; done once."""
    import onnx
    from onnx import TensorProto, helper

    if target.exists():
        return target
    model = onnx.load(str(source))
    graph, nodes = model.graph, []
    for node in graph.node:
        nodes.append(node)
        if node.name == "/encoder/Squeeze":  # F0 in Hz, (1, T)
            out, node.output[0] = node.output[0], "f0_teacher"
            nodes += [
                helper.make_node("Sub", ["f0_teacher", "f0_center"], ["f0_centred"]),
                helper.make_node("Mul", ["f0_centred", "f0_range"], ["f0_spread"]),
                helper.make_node("Add", ["f0_spread", "f0_target"], ["f0_moved"]),
                helper.make_node("Max", ["f0_moved", "f0_lowest"], ["f0_kept"]),
                helper.make_node("Greater", ["f0_teacher", "f0_floor"], ["voiced"]),
                helper.make_node("Where", ["voiced", "f0_kept", "f0_teacher"], [out]),
            ]
        elif node.name == "/encoder/Squeeze_1":  # log energy, (1, T)
            out, node.output[0] = node.output[0], "energy_teacher"
            nodes.append(helper.make_node("Add", ["energy_teacher", "energy_add"], [out]))
    del graph.node[:]
    graph.node.extend(nodes)
    for name in ("f0_center", "f0_range", "f0_target", "energy_add"):
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]))
    for name, value in (("f0_floor", 20.0), ("f0_lowest", 55.0)):
        graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [1], [value]))
    graph.output.append(helper.make_tensor_value_info(DURATIONS, TensorProto.FLOAT, None))
    graph.output.append(helper.make_tensor_value_info("f0_teacher", TensorProto.FLOAT, None))
    onnx.save(model, str(target))
    return target


class Teacher:
    """Text to speech with any Kokoro voice, any mix of them, in any manner.

    Args:
        graph: the graph written by `add_controls`.
        voices: folder of `<name>.bin`, float32 (510, 1, 256).
        vocab: JSON of phoneme symbol to id.
        threads: CPU threads of one call.
    """

    def __init__(self, graph: Path, voices: Path, vocab: Path, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self._styles = {f.stem: np.fromfile(f, np.float32).reshape(-1, 256) for f in sorted(voices.glob("*.bin"))}
        self._vocab: dict[str, int] = json.loads(vocab.read_text())
        self._centers: dict[str, float] = {}

    def style(self, voice: dict[str, float], phonemes: int, prosody_of: str | None = None) -> np.ndarray:
        """The style vector (1, 256) of a mix {voice: weight} for a sentence of so many phonemes."""
        mixed = sum(weight * self._styles[name][phonemes] for name, weight in voice.items())
        style = np.asarray(mixed, np.float32).copy()
        if prosody_of:
            style[PROSODY] = self._styles[prosody_of][phonemes][PROSODY]
        return style[None]

    def say(self, phonemes: str, voice: dict[str, float], manner: Manner = NEUTRAL) -> Spoken:
        """Render phonemes (misaki symbols) with a voice in a manner.

        Raises:
            ValueError: no known phoneme, or more than 509.
        """
        ids = [self._vocab[symbol] for symbol in phonemes if symbol in self._vocab]
        if not 0 < len(ids) <= MAX_PHONEMES:
            raise ValueError(
                f"{len(ids)} phonemes in {phonemes[:40]!r}: between 1 and {MAX_PHONEMES} can be said at once"
            )
        style = self.style(voice, len(ids), manner.prosody_of)
        center = self._center(voice, ids, style) if manner.f0_range != 1 or manner.f0_shift != 1 else 180.0
        audio, frames, _ = self._run(ids, style, manner, center)
        if manner.whisper:
            audio = whisperise(audio, seed=len(ids))
        if manner.formant != 1:
            audio = shift_formants(audio, manner.formant)
        return Spoken(audio, ids, frames)

    def _run(
        self, ids: list[int], style: np.ndarray, manner: Manner, center: float
    ) -> tuple[np.ndarray, list[int], np.ndarray]:
        audio, frames, f0 = self._session.run(
            ["audio", DURATIONS, "f0_teacher"],
            {
                "tokens": np.array([[0, *ids, 0]], np.int64),
                "style": style,
                "speed": np.array([manner.speed * _speed_of(manner)], np.float32),
                "f0_center": np.array([center], np.float32),
                "f0_range": np.array([manner.f0_range], np.float32),
                "f0_target": np.array([center * manner.f0_shift / _speed_of(manner)], np.float32),
                "energy_add": np.array([manner.energy], np.float32),
            },
        )
        return audio.ravel(), [round(float(x)) for x in frames.ravel()], f0.ravel()

    def _center(self, voice: dict[str, float], ids: list[int], style: np.ndarray) -> float:
        """The voice's mean F0 in Hz, from its first neutral sentence; the axis that range and shift turn about."""
        key = json.dumps(voice, sort_keys=True)
        if key not in self._centers:
            f0 = self._run(ids, style, NEUTRAL, 180.0)[2]
            self._centers[key] = float(np.mean(f0[f0 > 20])) if (f0 > 20).any() else 180.0
        return self._centers[key]


def _speed_of(manner: Manner) -> float:
    """Formant shifting resamples, which would change the rate and F0: the teacher speaks the opposite first."""
    return 1 / manner.formant


def shift_formants(audio: np.ndarray, factor: float) -> np.ndarray:
    """Play faster by `factor`: formants and F0 rise by it, the length falls by it. (n,) -> (n / factor,)."""
    import soxr

    return np.asarray(soxr.resample(audio, SAMPLE_RATE_HZ * factor, SAMPLE_RATE_HZ), np.float32)


def whisperise(audio: np.ndarray, seed: int, order: int = 26, hop: int = 120, window: int = 600) -> np.ndarray:
    """Voice to whisper: noise in place of the glottis through the same vocal tract (linear prediction, order 26).
    (n,) -> (n,)."""
    rng = np.random.default_rng(seed)
    taper = np.hanning(window).astype(np.float32)
    padded = np.pad(lfilter([1, -0.9], [1], audio).astype(np.float32), (window, window))
    out = np.zeros_like(padded)
    for start in range(0, len(padded) - window, hop):
        frame = padded[start : start + window] * taper
        gain, predictor = _linear_prediction(frame, order)
        if gain > 0:
            noise = rng.standard_normal(window).astype(np.float32)
            out[start : start + window] += lfilter([gain], predictor, noise).astype(np.float32) * taper
    out = lfilter([1], [1, -0.55], out)[window:-window].astype(np.float32)  # a whisper is flatter than a voice
    level = np.sqrt(np.mean(audio**2)) / max(float(np.sqrt(np.mean(out**2))), 1e-6)
    return np.asarray(np.clip(out * level * 0.5, -0.98, 0.98), np.float32)


def _linear_prediction(frame: np.ndarray, order: int) -> tuple[float, np.ndarray]:
    """Levinson-Durbin: the gain per unit noise and the predictor polynomial (order + 1,)."""
    from scipy.linalg import solve_toeplitz

    spectrum = np.abs(np.fft.rfft(frame, 2048)) ** 2
    correlation = np.fft.irfft(spectrum)[: order + 1]
    if correlation[0] < 1e-7:
        return 0.0, np.ones(1)
    correlation[0] *= 1.0001
    taps = solve_toeplitz(correlation[:-1], correlation[1:])
    error = max(float(correlation[0] - taps @ correlation[1:]), 0.0)
    return float(np.sqrt(error / len(frame))), np.concatenate([[1.0], -taps])


def open_teacher(found: Assets, threads: int = 1) -> Teacher:
    """The teacher over the fetched packages, its graph with controls kept beside theirs."""
    graph = add_controls(found.kokoro, found.kokoro.with_name("kokoro-controls.onnx"))
    return Teacher(graph, found.voices, found.vocab, threads)
