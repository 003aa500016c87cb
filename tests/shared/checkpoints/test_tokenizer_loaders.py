"""The front end's encoders out of a checkpoint directory: right numbers, batches, and clear complaints."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shared.audio.features import MelConfig
from shared.checkpoints.export import (
    export_semantic_onnx,
    export_speaker_onnx,
    save_linguistic,
)
from shared.checkpoints.layout import Checkpoint, InvalidCheckpoint
from shared.checkpoints.tokenizer import (
    _similar_lengths,
    load_linguistic,
    load_mel_config,
    load_semantic,
    load_speaker,
)
from shared.errors import MissingComponent
from shared.models.semantic import SemanticConfig, SemanticEncoder, WhisperSemanticConfig, WhisperSemanticEncoder
from shared.models.speaker import SpeakerConfig, SpeakerEncoder

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "linguistic_small"
CLIPS = ("en_happy_prompt", "zero_shot_en_prompt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A flat checkpoint: the golden linguistic encoder, small random semantic and speaker encoders."""
    root = tmp_path_factory.mktemp("checkpoint")
    for name in ("config.yaml", "model.pt", "am.mvn", "linguistic_tokenizer.npy"):
        shutil.copy(GOLDEN / name, root / name)
    torch.manual_seed(0)
    semantic = SemanticEncoder(SemanticConfig(size=32, heads=4, layers=1, codebook_dim=32))
    export_semantic_onnx(semantic, root / "speech_tokenizer_v1.onnx")
    speaker = SpeakerConfig(front_channels=4, channels=16, growth=8, bottleneck=16, blocks=(2,), dilations=(1,))
    export_speaker_onnx(SpeakerEncoder(speaker), root / "campplus.onnx")
    return root


@pytest.fixture(scope="module")
def checkpoint(folder) -> Checkpoint:
    return Checkpoint.resolve(folder)


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def audio() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "io.safetensors")


def test_linguistic_codes_are_the_official_ones_one_by_one_and_in_a_batch(checkpoint, audio):
    tokenizer = load_linguistic(checkpoint)
    rows = [audio[f"{clip}.audio_16k"] for clip in CLIPS]
    together = tokenizer.encode([*rows, torch.zeros(500)])
    for row, found, clip in zip(rows, together, CLIPS, strict=False):
        expected = audio[f"{clip}.codes"].numpy()
        assert found.dtype == np.int32
        assert np.array_equal(found, tokenizer.encode([row])[0])
        assert (found == expected).mean() > 0.98
    assert len(together[2]) == 0


def test_lower_precision_keeps_most_codes(checkpoint, audio):
    row = audio[f"{CLIPS[0]}.audio_16k"]
    exact = load_linguistic(checkpoint).encode([row])[0]
    rounded = load_linguistic(checkpoint, dtype=torch.bfloat16).encode([row])[0]
    assert (exact == rounded).mean() > 0.7


def test_semantic_codes_come_at_25_hz_and_a_batch_equals_its_rows(checkpoint, audio):
    tokenizer = load_semantic(checkpoint, threads=1)
    rows = [audio[f"{clip}.audio_16k"] for clip in CLIPS]
    together = tokenizer.encode([*rows, torch.zeros(479)])
    assert tokenizer.takes_batches
    assert [len(codes) for codes in together] == [185, 128, 0]
    assert all(np.array_equal(codes, tokenizer.encode([row])[0]) for codes, row in zip(together, rows, strict=False))


def test_long_recordings_are_cut_into_pieces_of_thirty_seconds(checkpoint):
    tokenizer = load_semantic(checkpoint, threads=1)
    torch.manual_seed(1)
    whole = torch.randn(30 * 16000 + 5000) * 0.1
    found = tokenizer.encode([whole, whole[:480300]])
    assert np.array_equal(found[0], np.concatenate(tokenizer.encode([whole[:480000], whole[480000:]])))
    assert len(found[1]) == 750  # a rest of 300 samples is dropped


def test_a_session_with_another_rate_is_recognised(checkpoint):
    tokenizer = load_semantic(checkpoint, threads=1)
    with pytest.raises(InvalidCheckpoint, match="25 per second"):
        tokenizer._check(np.zeros(60, np.int32), 2.0)


def test_speaker_embeddings_have_192_values_for_any_length(checkpoint, audio):
    speaker = load_speaker(checkpoint, threads=1)
    found = speaker.embed([audio[f"{CLIPS[0]}.audio_16k"], torch.randn(100)])
    assert [vector.shape for vector in found] == [(192,), (192,)]
    assert np.abs(found[0] - found[1]).max() > 0


def test_what_is_saved_is_loaded_again(checkpoint, audio, tmp_path):
    before = load_linguistic(checkpoint)
    save_linguistic(before.encoder, before.cmvn, before.centroids, tmp_path, tmp_path / "linguistic_tokenizer.npy")
    after = load_linguistic(Checkpoint.resolve(tmp_path))
    row = audio[f"{CLIPS[1]}.audio_16k"]
    assert np.array_equal(before.encode([row])[0], after.encode([row])[0])
    save_linguistic(before.encoder, before.cmvn, before.centroids, tmp_path, tmp_path / "linguistic_tokenizer.npy",
                    is_half=True)  # fmt: skip
    half = load_linguistic(Checkpoint.resolve(tmp_path))
    assert {parameter.dtype for parameter in half.encoder.parameters()} == {torch.float32}
    assert (before.encode([row])[0] == half.encode([row])[0]).mean() > 0.9


@pytest.mark.parametrize(
    ("file", "load"),
    [("model.pt", load_linguistic), ("am.mvn", load_linguistic), ("linguistic_tokenizer.npy", load_linguistic),
     ("config.yaml", load_linguistic), ("speech_tokenizer_v1.onnx", load_semantic), ("campplus.onnx", load_speaker)],
)  # fmt: skip
def test_a_missing_or_damaged_file_is_named(copy, file, load):
    (copy / file).write_bytes((copy / file).read_bytes()[:100])
    with pytest.raises(InvalidCheckpoint, match=file):
        load(Checkpoint.resolve(copy))
    (copy / file).unlink()
    with pytest.raises(MissingComponent, match=file):
        load(Checkpoint.resolve(copy))


def test_files_that_do_not_fit_each_other_are_named(copy):
    np.save(copy / "linguistic_tokenizer.npy", np.zeros((1024, 32), np.float32))
    with pytest.raises(InvalidCheckpoint, match=r"linguistic_tokenizer.npy.*\(1024, 32\)"):
        load_linguistic(Checkpoint.resolve(copy))
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("linear_units: 96", "linear_units: 128"))
    with pytest.raises(InvalidCheckpoint, match=r"model.pt does not fit"):
        load_linguistic(Checkpoint.resolve(copy))
    shutil.copy(copy / "campplus.onnx", copy / "speech_tokenizer_v1.onnx")
    with pytest.raises(InvalidCheckpoint, match=r"speech_tokenizer_v1\.onnx takes"):
        load_semantic(Checkpoint.resolve(copy))


def test_the_mel_is_sized_by_the_decoders_configuration(tmp_path):
    shutil.copy(GOLDEN.parent / "decoder_small" / "cosyvoice.yaml", tmp_path)
    assert load_mel_config(Checkpoint.resolve(tmp_path)) == MelConfig()
    text = (tmp_path / "cosyvoice.yaml").read_text()
    for wrong in ("hop_size: many", "hop_size: 0", "hop_size: 4000"):
        (tmp_path / "cosyvoice.yaml").write_text(text.replace("hop_size: 480", wrong))
        with pytest.raises(InvalidCheckpoint, match="no sizes of a mel"):
            load_mel_config(Checkpoint.resolve(tmp_path))


def test_rows_are_grouped_by_similar_length():
    assert list(_similar_lengths([100, 10, 19, 21, 0, 150])) == [[1, 2], [3], [0, 5]]


@pytest.mark.parametrize(("stored", "share", "equal"), [("float16", 0.6, 0.95), ("int8", 0.4, 0.7)])
def test_weights_in_fewer_bytes_give_nearly_the_same_codes(tmp_path, audio, stored, share, equal):
    torch.manual_seed(1)
    encoder = WhisperSemanticEncoder(WhisperSemanticConfig(size=64, heads=4, layers=2, width=64, codebook_dim=8))
    rows = [audio["en_happy_prompt.audio_16k"]]
    files = {"float32": tmp_path / "whole" / "speech_tokenizer_v1.onnx", stored: tmp_path / "speech_tokenizer_v1.onnx"}
    found = {}
    for name, file in files.items():
        export_semantic_onnx(encoder, file, stored=name)
        shutil.copy(GOLDEN / "config.yaml", file.parent)
        found[name] = load_semantic(Checkpoint.resolve(file.parent)).encode(rows)[0]
    assert files[stored].stat().st_size < share * files["float32"].stat().st_size
    assert len(found[stored]) == len(found["float32"])
    assert float(np.mean(found[stored] == found["float32"])) >= equal
