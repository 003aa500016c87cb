"""Run one component of a checkpoint on recorded inputs and write what comes out: parity with another implementation.

A folder holds a component in the published layout and `io.safetensors` with inputs (and perhaps expected outputs, which
are never read); tests/data/golden/README.md names them. Knows nothing about services.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from shared.audio.features import linguistic_features, prompt_mel, speaker_fbank, whisper_log_mel
from shared.audio.io import read_audio
from shared.audio.signal import limit_peak, normalize_peak, resample, trim_silence
from shared.checkpoints.decoder import load_flow, load_vocoder
from shared.checkpoints.layout import MALFORMED, Checkpoint, InvalidCheckpoint, read_json
from shared.checkpoints.step1 import load_step1
from shared.checkpoints.tokenizer import load_linguistic
from shared.codes import time_align
from shared.errors import UserError
from shared.files import check_target, make_folder, write_atomically
from shared.models.hift import HiFT
from shared.models.linguistic import nearest

IO_FILE = "io.safetensors"
AUDIO_FOLDERS = ("audio", "../audio", "../../audio")
TOKEN_RATE_HZ, MEL_RATE_HZ = 16000, 24000


@dataclass(frozen=True)
class Replay:
    """What was run and the shapes that it gave."""

    kind: str
    shapes: dict[str, tuple[int, ...]]


def replay(folder: Path, out: Path) -> Replay:
    """Run the component found in `folder`, in float32 on the CPU, and write its outputs to the safetensors file `out`.

    Raises UserError where the folder holds no known component, lacks an input or has one that does not fit, and where
    `out` cannot be written.
    """
    kind = detect(folder)
    make_folder(out.parent)
    check_target(out)
    try:
        with torch.inference_mode():
            outputs = _RUNS[kind](folder)
    except MALFORMED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"The {kind} in {folder} cannot run on the inputs of {IO_FILE} ({reason}).",
                        "tests/data/golden/README.md gives their shapes.", "wrong_input") from error  # fmt: skip
    write_atomically(out, save({name: tensor.contiguous() for name, tensor in outputs.items()}))
    return Replay(kind, {name: tuple(tensor.shape) for name, tensor in outputs.items()})


def detect(folder: Path) -> str:
    """The kind of component in a folder, by its config files. Raises UserError where there is none."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder.", "Give a folder with a component and io.safetensors.", "nothing_to_replay"
        )
    if (folder / "cosyvoice.yaml").is_file():
        return "decoder"
    if (folder / "config.yaml").is_file() and (folder / "am.mvn").is_file():
        return "linguistic"
    if (folder / "config.json").is_file():
        return "vocoder" if "upsample_rates" in read_json(folder / "config.json") else "step1"
    if any(path.name != IO_FILE for path in folder.glob("*.safetensors")):
        return "frontend"
    raise UserError(
        f"{folder} holds no component: no config.json, config.yaml or cosyvoice.yaml, and no clips.",
        "tests/data/golden shows the folders that can be replayed.",
        "nothing_to_replay",
    )


def _inputs(folder: Path, *names: str) -> dict[str, Tensor]:
    """The named tensors of io.safetensors, nothing else."""
    with _recorded(folder) as file:
        lacking = sorted(set(names) - set(file.keys()))
        if lacking:
            raise UserError(f"{folder / IO_FILE} lacks the inputs {', '.join(lacking)}.", "", "missing_input")
        return {name: file.get_tensor(name) for name in names}


@contextmanager
def _recorded(folder: Path) -> Iterator[Any]:
    """The open io.safetensors of a folder. Raises UserError where it is missing or damaged."""
    path = folder / IO_FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist.", "It holds the inputs to run on.", "missing_input")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InvalidCheckpoint(f"{path} is not a file of tensors ({error}).", "Write it again.") from error


def _step1(folder: Path) -> dict[str, Tensor]:
    ids = _inputs(folder, "input_ids")["input_ids"]
    model = load_step1(Checkpoint.resolve(folder), dtype=torch.float32, device="cpu", quantize=None)
    hidden, logits = model(ids)
    return {"hidden_states": hidden, "logits": logits}


def _decoder(folder: Path) -> dict[str, Tensor]:
    given = _inputs(folder, "tokens", "prompt_tokens", "prompt_mel", "speaker_embedding", "noise")
    checkpoint = Checkpoint.resolve(folder)
    flow = load_flow(checkpoint, dtype=torch.float32, device="cpu")
    aligned, prompt = time_align(given["tokens"]), time_align(given["prompt_tokens"])
    pairs = torch.cat([prompt, aligned])[None]
    reference = given["prompt_mel"].transpose(1, 2)  # (1, 80, frames)
    reference = functional.interpolate(reference, size=flow.frames_per_token * len(prompt), mode="nearest")
    frames = flow.frames_per_token * pairs.shape[1]
    mel = flow.sample(
        pairs,
        torch.tensor([pairs.shape[1]]),
        reference.transpose(1, 2),
        torch.tensor([reference.shape[2]]),
        given["speaker_embedding"],
        given["noise"].transpose(1, 2)[:, :frames],
    )
    mel = mel[:, reference.shape[2] :].transpose(1, 2)  # (1, 80, frames of the result)
    outputs = {"tokens_time_aligned": aligned, "mel": mel}
    return outputs | _wave(checkpoint, mel)


def _vocoder(folder: Path) -> dict[str, Tensor]:
    wave = _wave(Checkpoint.resolve(folder), _inputs(folder, "mel")["mel"])["wav"]
    return {"wav": wave[:, None]}  # (B, 1, samples), as the published generators return it


def _wave(checkpoint: Checkpoint, mel: Tensor) -> dict[str, Tensor]:
    """The waveform without the source's noise, and the pitch where the vocoder has a pitch predictor."""
    vocoder = load_vocoder(checkpoint, dtype=torch.float32, device="cpu")
    if isinstance(vocoder, HiFT):
        vocoder.noise_scale = 0.0
        return {"f0": vocoder.f0(mel), "wav": vocoder(mel)}
    return {"wav": vocoder(mel)}


def _linguistic(folder: Path) -> dict[str, Tensor]:
    suffix = ".audio_16k"
    with _recorded(folder) as file:
        clips = [name.removesuffix(suffix) for name in file.keys() if name.endswith(suffix)]  # noqa: SIM118
    linguistic = load_linguistic(Checkpoint.resolve(folder))
    outputs: dict[str, Tensor] = {}
    for clip in clips:
        audio = _inputs(folder, clip + suffix)[clip + suffix]
        features = linguistic_features(audio, cmvn=linguistic.cmvn)[None]
        hidden = linguistic.encoder(features)
        codes = nearest(hidden[0], linguistic.centroids)
        outputs |= {f"{clip}.features": features, f"{clip}.encoder_out": hidden, f"{clip}.codes": codes}
    return outputs


def _frontend(folder: Path) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        places = [folder / name / f"{path.stem}.wav" for name in AUDIO_FOLDERS]
        audio = next((place for place in places if place.is_file()), None)
        if audio is None:
            tried = ", ".join(map(str, places))
            raise UserError(f"No recording for {path.stem}: looked for {tried}.", "", "missing_input")
        outputs |= {f"{path.stem}.{name}": tensor for name, tensor in _features(audio).items()}
    return outputs


def _features(path: Path) -> Mapping[str, Tensor]:
    recording = read_audio(path)
    rate, samples = recording.sample_rate_hz, limit_peak(torch.from_numpy(np.ascontiguousarray(recording.samples)))
    tokens = normalize_peak(resample(samples, rate, TOKEN_RATE_HZ, filter_dtype=torch.float64))
    trimmed = trim_silence(tokens)
    return {
        "trimmed_16k": trimmed,
        "prompt_mel": prompt_mel(resample(samples, rate, MEL_RATE_HZ))[None],
        "speaker_fbank": speaker_fbank(resample(samples, rate, TOKEN_RATE_HZ)),
        "whisper_log_mel": whisper_log_mel(trimmed),
    }


_RUNS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "step1": _step1,
    "decoder": _decoder,
    "vocoder": _vocoder,
    "linguistic": _linguistic,
    "frontend": _frontend,
}
