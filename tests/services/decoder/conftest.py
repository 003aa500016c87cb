"""The golden decoder and nano's as served models, and their requests."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from services.decoder.model import DecoderModel
from services.decoder.settings import DecoderSettings
from services.tokenizer.model import TokenizerModel
from shared.audio.io import read_audio
from shared.checkpoints.layout import Checkpoint
from shared.codes import GROUP, interleave
from shared.inference.port import InferenceRequest

AUDIO = Path(__file__).parents[2] / "data" / "audio" / "en_happy_prompt.wav"
GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "decoder_small"
torch.set_num_threads(1)  # these models are too small to share out


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(scope="session")
def model() -> DecoderModel:
    return DecoderModel(Checkpoint.resolve(GOLDEN), settings=DecoderSettings(dtype="float32"))


@pytest.fixture
def asked(golden: dict[str, Tensor]) -> InferenceRequest:
    inputs = {
        "mixed": golden["tokens"].numpy(),
        "prompt_mixed": golden["prompt_tokens"].numpy(),
        "prompt_mel": golden["prompt_mel"][0].numpy(),
        "speaker_embedding": golden["speaker_embedding"][0].numpy(),
    }
    return InferenceRequest(inputs, {"steps": 4, "seed": 11})


@pytest.fixture(scope="session")
def nano() -> DecoderModel:
    return DecoderModel(Checkpoint.resolve("nano"), settings=DecoderSettings(dtype="float32"))


@pytest.fixture(scope="session")
def spoken() -> InferenceRequest:
    """A recording's second half in the voice of its first, as nano's codes."""
    sound = read_audio(AUDIO)
    [answer] = TokenizerModel(Checkpoint.resolve("nano")).infer(
        [InferenceRequest({"audio": sound.samples}, {"sample_rate_hz": sound.sample_rate_hz})]
    )
    assert not isinstance(answer, Exception)
    mixed = interleave(answer["linguistic"], answer["semantic"])
    half = len(mixed) // 2 // GROUP * GROUP
    inputs = {
        "mixed": mixed[half:],
        "prompt_mixed": mixed[:half],
        "prompt_mel": answer["prompt_mel"][: len(answer["prompt_mel"]) // 2],
        "speaker_embedding": answer["speaker_embedding"],
    }
    return InferenceRequest(inputs, {"seed": 11})
