"""Assemble the small checkpoint in the published layout from the runs. `python -m
services.trainer.recipes.nano.export models/nano`.

Weights in bfloat16 where a loader converts them, the tokenizers' in float16; a `SHA256SUMS` beside them. Where the
runs were restored from a released checkpoint (`restore`), `--tokenizers CHECKPOINT` takes its tokenizers and speaker
encoder.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.trainer.data import paralinguistic_sounds
from services.trainer.recipes.nano import (
    flow,
    linguistic,
    llm,
    manners,
    recognizer,
    semantic,
    speaker,
    teacher,
    text_tokenizer,
)
from services.trainer.recipes.nano.run import TRAINED, Run, last_trained, trained
from shared.checkpoints import manifest
from shared.checkpoints.export import export_semantic_onnx, export_speaker_onnx, save_linguistic
from shared.checkpoints.layout import (
    DECODER_FOLDER,
    EDITX_FOLDER,
    LINGUISTIC_FOLDER,
    RECOGNIZER_FILE,
    TOKENIZER_FOLDER,
    Checkpoint,
)
from shared.checkpoints.recognizer import save_recognizer
from shared.models.recognizer import Recognizer
from shared.models.spectral import SpectralConfig, SpectralVocoder
from shared.models.step1 import Step1
from shared.prompts import TextTokenizer

VERSION = "0.12.0"
SPEAKER_FILE = Path(EDITX_FOLDER) / DECODER_FOLDER / "campplus.onnx"
TOKENIZERS = ("linguistic", "semantic", "speaker")
TEMPERATURE = 0.2
"""Of 0.2, 0.4 and 0.7 the one with the fewest wrong words, on sentences and voices outside the benchmark."""
CANDIDATES = 8
"""Answers of which the recogniser keeps one."""
GUIDANCE = 2.0
"""Away from the same said plainly, for edits of the manner."""
MEL = {
    "num_mels": 80,
    "n_fft": 1920,
    "hop_size": 480,
    "win_size": 1920,
    "sampling_rate": 24000,
    "fmin": 0,
    "fmax": 8000,
}
TRAINED_ON = {
    "emotion": sorted(teacher.EMOTIONS),
    "style": sorted(teacher.STYLES),
    "speed": sorted(teacher.SPEEDS),
    "paralinguistic": sorted(paralinguistic_sounds.TAGS),
    "denoise": True,
    "vad": True,
    "languages": ["en", "zh"],
}


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """bfloat16, contiguous, on the CPU."""
    return {name: tensor.detach().cpu().to(torch.bfloat16).contiguous() for name, tensor in state.items()}


def write_language_model(folder: Path) -> None:
    tokenizer = text_tokenizer.tokenizer_file()
    recipe = llm.GPU
    model = Step1(llm.config(recipe, TextTokenizer.from_file(tokenizer).vocab_size))
    trained(last_trained("llm", "words"), "model", model)
    (folder / "config.json").write_text(model.config.to_json())
    save_file(halved(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(tokenizer, folder / "tokenizer.model")


def write_decoder(folder: Path) -> None:
    save_file(halved(flow.averaged(last_trained("flow", "heard")).state_dict()), folder / "flow.safetensors")
    config = SpectralConfig()
    wave = trained("vocoder", "model", SpectralVocoder(config))
    save_file(halved(wave.state_dict()), folder / "hift.safetensors")
    section = {
        "in_channels": config.in_channels,
        "hidden": config.hidden,
        "blocks": config.blocks,
        "fine_blocks": config.fine_blocks,
    }
    document = {"mel_conf": MEL, "flow": flow.SECTION, "spectral": section}
    (folder / "cosyvoice.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


def write_recognizer(root: Path) -> None:
    model = Recognizer(recognizer.config())
    trained("recognizer", "model", model)
    save_recognizer(model, root / RECOGNIZER_FILE)


def write_tokenizers(root: Path) -> None:
    """The two tokenizers and the speaker encoder, from their runs."""
    folder = root / TOKENIZER_FOLDER
    pupil = speaker.Pupil(512)
    trained("speaker", "model", pupil)
    export_speaker_onnx(pupil.encoder.eval(), root / SPEAKER_FILE)
    student = linguistic.Student()
    trained("linguistic", "model", student)
    cmvn = torch.stack([student.shift, student.scale])
    save_linguistic(
        student.encoder,
        cmvn,
        student.codebook.centroids,
        folder / LINGUISTIC_FOLDER,
        folder / "linguistic_tokenizer.npy",
        is_half=True,
    )
    autoencoder = semantic.Autoencoder(linguistic.CONFIG.output_size)
    trained("semantic", "model", autoencoder)
    encoder = autoencoder.encoder
    encoder.codebook.copy_(autoencoder.codebook.centroids)
    export_semantic_onnx(encoder.eval(), folder / "speech_tokenizer_v1.onnx", stored="int8")


def copy_tokenizers(released: Checkpoint, root: Path) -> dict[str, int]:
    """The same from a released checkpoint, the linguistic encoder in float16; the steps that they were trained for."""
    shutil.copytree(released.root / TOKENIZER_FOLDER, root / TOKENIZER_FOLDER, dirs_exist_ok=True)
    linguistic_file = Checkpoint(root).linguistic_file
    state = {name: tensor.half() for name, tensor in load_file(linguistic_file).items()}
    save_file(state, linguistic_file)
    shutil.copy(released.speaker_onnx, root / SPEAKER_FILE)
    steps = json.loads((released.root / "editx.json").read_text())["steps"]
    return {name: steps[name] for name in TOKENIZERS}


def write_sums(root: Path) -> None:
    """SHA256SUMS of every other file."""
    files = [f for f in root.rglob("*") if f.is_file() and f.name != manifest.FILE]
    manifest.write(root, {f.relative_to(root).as_posix(): manifest.sha256(f) for f in files})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--tokenizers", help="a released checkpoint whose tokenizers these runs were trained on")
    arguments = parser.parse_args()
    target: Path = arguments.target
    if target.exists() and not (target / "editx.json").exists():
        raise SystemExit(f"{target} is there and is no checkpoint: name another folder")
    root = target.with_name(f".{target.name}.partial")
    shutil.rmtree(root, ignore_errors=True)
    decoder, tokenizer = root / EDITX_FOLDER / DECODER_FOLDER, root / TOKENIZER_FOLDER
    for folder in (decoder, tokenizer):
        folder.mkdir(parents=True, exist_ok=True)
    steps = {name: Run(name, {}, 0).step for name in TRAINED}
    write_language_model(root / EDITX_FOLDER)
    write_decoder(decoder)
    write_recognizer(root)
    if arguments.tokenizers is None:
        write_tokenizers(root)
    else:
        steps |= copy_tokenizers(Checkpoint.resolve(arguments.tokenizers), root)
    document = {
        "name": "nano",
        "version": VERSION,
        "trained_on": TRAINED_ON,
        "trim_before_mel": True,
        "temperature": TEMPERATURE,
        "candidates": CANDIDATES,
        "guidance": GUIDANCE,
        "manners": manners.read(),
        "steps": steps,
    }
    (root / "editx.json").write_text(json.dumps(document, indent=2) + "\n")
    write_sums(root)
    shutil.rmtree(target, ignore_errors=True)  # never written into: other checkpoints are linked to its files
    root.rename(target)
    print(f"{target}: {sum(f.stat().st_size for f in target.rglob('*') if f.is_file()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
