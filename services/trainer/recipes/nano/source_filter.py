"""A cheap teacher: one distilled voice at a hundred times real time, taken apart into source and filter.

hibari (Apache-2.0, distilled from one voice of the teacher) predicts, per 12.5 ms, the spectral envelope of the
harmonics, that of the noise, a residue of free phase, and F0. Between the network and its signal processing all of
them can be moved: formants, tilt, breath and pitch make other speakers; F0 range, F0 level, rate, energy and whisper
make the manners of `teacher`. Every utterance carries its phonemes, their frames and its F0. Knows nothing about
datasets.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from services.trainer.recipes.nano.teacher import Manner

FRAME_S = 0.0125
DURATIONS = "/Clip_output_0"
LOWEST_HZ = 55.0
BINS = 601
OCTAVES = np.log2(np.maximum(np.arange(BINS), 3) * 20.0 / 1000.0).astype(np.float32)
"""Of each bin of 20 Hz above 1 kHz."""


@dataclass(frozen=True)
class Speaker:
    """How a virtual speaker differs from the distilled voice: factors, but decibels for tilt (per octave), breath
    and the equaliser's nodes, which lie evenly from 0 to 12 kHz."""

    formant: float = 1.0
    bend: float = 0.0
    f0: float = 1.0
    f0_range: float = 1.0
    speed: float = 1.0
    tilt: float = 0.0
    breath: float = 0.0
    equaliser: tuple[float, ...] = (0.0, 0.0)

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> Speaker:
        """Half of them low and large, half high and small, as men and women are."""
        low = rng.random() < 0.5
        return cls(
            formant=float(rng.uniform(0.86, 0.96) if low else rng.uniform(0.96, 1.14)),
            bend=float(rng.uniform(-0.08, 0.08)),
            f0=float(rng.uniform(0.5, 0.75) if low else rng.uniform(0.8, 1.2)),
            f0_range=float(rng.uniform(0.7, 1.35)),
            speed=float(rng.uniform(0.88, 1.15)),
            tilt=float(rng.uniform(-2.0, 2.0)),
            breath=float(rng.uniform(-4.0, 6.0)),
            equaliser=tuple(float(x) for x in rng.normal(0.0, 2.5, 9)),
        )


@dataclass(frozen=True)
class Reading:
    """24 kHz float32 audio (n,), phoneme ids, their frames of 12.5 ms (ends included as phoneme 0), F0 in Hz per
    frame (0 unvoiced)."""

    audio: np.ndarray
    phoneme_ids: list[int]
    frames: list[int]
    f0: np.ndarray


def with_durations(source: Path, target: Path) -> Path:
    """Write the network with its frames per phoneme as one more output; done once."""
    import onnx
    from onnx import TensorProto, helper

    if not target.exists():
        model = onnx.load(str(source))
        model.graph.output.append(helper.make_tensor_value_info(DURATIONS, TensorProto.FLOAT, None))
        onnx.save(model, str(target))
    return target


class SourceFilter:
    """Text to speech by any virtual speaker in any manner.

    Args:
        graph: where the network with its durations is kept (made when missing).
    """

    def __init__(self, graph: Path, threads: int = 1) -> None:
        from hibari import Hibari, dsp

        self._hibari, self._synthesise = Hibari(), dsp.synth
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        options.log_severity_level = 3
        file = with_durations(Path(self._hibari.model_path), graph)
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]

    def phonemes(self, text: str) -> list[str]:
        """Sentences in the teacher's symbols, words parted by spaces."""
        found: list[str] = self._hibari.phonemize(text)
        return found

    def say(self, sentences: list[str], speaker: Speaker, manner: Manner, rng: np.random.Generator) -> Reading:
        """Sentences of phonemes one after the other; `rng` draws the noise."""
        audio, pitch = [], []
        ids: list[int] = []
        frames: list[int] = []
        for number, sentence in enumerate(sentences):
            tokens = self._hibari.ids(sentence)
            inputs = {
                "ids": np.array([tokens], np.int64),
                "speed": np.array([speaker.speed * manner.speed], np.float32),
            }
            found = dict(zip(self._outputs, self._session.run(None, inputs), strict=True))
            spectrum = {name: found[name][0] for name in ("lh", "theta", "ln", "lr", "phi", "f0")}
            moved = move(spectrum, speaker, manner)
            audio.append(self._synthesise(*(moved[name] for name in ("lh", "theta", "ln", "lr", "phi", "f0")), rng))
            pitch.append(np.where(moved["f0"] > 40.0, moved["f0"], 0.0))
            lengths = found[DURATIONS].reshape(-1).astype(int).tolist()
            if number:  # the pause between two sentences: the end of one and the start of the next
                frames[-1] += lengths[0]
                tokens, lengths = tokens[1:], lengths[1:]
            ids += tokens
            frames += lengths
        return Reading(np.concatenate(audio), ids[1:-1], frames, np.concatenate(pitch).astype(np.float32))


def move(spectrum: dict[str, np.ndarray], speaker: Speaker, manner: Manner) -> dict[str, np.ndarray]:
    """The network's outputs, each (601, F) and F0 (F,), of another speaker in a manner."""
    formant = speaker.formant * manner.formant
    at = np.arange(BINS) / (formant * (1 + speaker.bend * (np.arange(BINS) / BINS - 0.5)))
    at = np.clip(at, 0, BINS - 1.001)
    low, share = at.astype(int), (at % 1)[:, None].astype(np.float32)
    out = {name: a[low] * (1 - share) + a[low + 1] * share for name, a in spectrum.items() if name != "f0"}

    nodes = np.linspace(0, BINS - 1, len(speaker.equaliser))
    tilt = speaker.tilt + 2.0 * manner.energy  # loud voices are bright
    gain_db = np.interp(np.arange(BINS), nodes, speaker.equaliser) + tilt * OCTAVES
    gain = ((gain_db / 8.686 + manner.energy)[:, None]).astype(np.float32)
    out["lh"], out["ln"], out["lr"] = out["lh"] + gain, out["ln"] + gain + speaker.breath / 8.686, out["lr"] + gain

    f0 = spectrum["f0"]
    voiced = f0 > 40.0
    if manner.whisper:
        out["ln"] = np.logaddexp(out["ln"], out["lh"] - 2.6 + 0.12 * OCTAVES[:, None])
        out["lh"] = np.full_like(out["lh"], -18.0)
        out["lr"] = out["lr"] - 3.0
        return out | {"f0": np.zeros_like(f0)}
    center = float(np.median(f0[voiced])) if voiced.any() else 0.0
    f0_range, shift = speaker.f0 * speaker.f0_range * manner.f0_range, speaker.f0 * manner.f0_shift
    moved = np.maximum((f0 - center) * f0_range + center * shift, LOWEST_HZ)
    return out | {"f0": np.where(voiced, moved, 0.0).astype(np.float32)}
