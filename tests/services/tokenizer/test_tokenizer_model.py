"""The tokenizer model: the official numbers end to end, batches, isolation of bad requests, and its memory."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.torch import load_file

from services.tokenizer.model import TokenizerModel
from services.tokenizer.settings import TokenizerSettings
from shared.checkpoints.layout import Checkpoint
from shared.codes import interleave
from shared.errors import UserError
from shared.inference.port import InferenceRequest

DATA = Path(__file__).parents[2] / "data"
CLIPS = ("en_happy_prompt", "zero_shot_en_prompt")


def request(audio: np.ndarray, rate: int = 24000, **parameters) -> InferenceRequest:
    return InferenceRequest({"audio": audio}, {"sample_rate_hz": rate, **parameters})


def clip(name: str, **parameters) -> InferenceRequest:
    samples, rate = soundfile.read(DATA / "audio" / f"{name}.wav", dtype="float32")
    return request(samples, rate, **parameters)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(int(seconds * 24000)) * 0.1).astype(np.float32)


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory) -> Checkpoint:
    """The tiny checkpoint with the golden linguistic tokenizer in it."""
    root = tmp_path_factory.mktemp("tokenizer") / "checkpoint"
    shutil.copytree(tiny, root)
    found = Checkpoint.resolve(root)
    golden, folder, centroids = DATA / "golden" / "linguistic_small", found.linguistic_dir, found.centroids_file
    found.linguistic_file.unlink()
    for name in ("config.yaml", "model.pt", "am.mvn"):
        shutil.copy(golden / name, folder / name)
    shutil.copy(golden / "linguistic_tokenizer.npy", centroids)
    return Checkpoint.resolve(root)


@pytest.fixture(scope="module")
def model(checkpoint) -> TokenizerModel:
    return TokenizerModel(checkpoint)


def fresh(checkpoint: Checkpoint, **settings) -> TokenizerModel:
    return TokenizerModel(checkpoint, settings=TokenizerSettings(**settings))


@pytest.mark.parametrize("name", CLIPS)
def test_a_recording_gives_the_official_codes_and_mel(model, name):
    (found,) = model.infer([clip(name)])
    io = load_file(DATA / "golden" / "linguistic_small" / "io.safetensors")
    front = load_file(DATA / "golden" / "frontend_small" / f"{name}.safetensors")
    assert found["linguistic"].shape == io[f"{name}.codes"].shape
    assert (found["linguistic"] == io[f"{name}.codes"].numpy()).mean() > 0.98
    assert np.allclose(found["prompt_mel"], front["prompt_mel"][0].numpy(), atol=1e-2)
    assert len(found["semantic"]) == -(-front["whisper_log_mel"].shape[1] // 4)
    assert found["speaker_embedding"].shape == (192,)
    assert len(interleave(found["linguistic"], found["semantic"])) % 5 == 0
    assert set(model.stage_s) == {"prepare", "linguistic", "semantic", "speaker", "mel"}


def test_a_batch_gives_each_request_what_it_gets_alone(checkpoint):
    requests = [clip(CLIPS[0]), request(noise(0.4)), clip(CLIPS[1]), request(noise(3.0), 8000)]
    together = fresh(checkpoint).infer(requests)
    for asked, found in zip(requests, together, strict=True):
        (alone,) = fresh(checkpoint).infer([asked])
        assert np.array_equal(alone["linguistic"], found["linguistic"])
        assert np.array_equal(alone["semantic"], found["semantic"])
        assert np.allclose(alone["prompt_mel"], found["prompt_mel"], atol=1e-4)
        assert np.allclose(alone["speaker_embedding"], found["speaker_embedding"], atol=1e-4)


def test_a_bad_request_fails_alone(model):
    samples = noise(1.0)
    answers = model.infer([
        request(np.zeros(24000, np.float32)), request(samples), request(samples[:100]),
        request(np.full(24000, np.nan, np.float32)), request(np.tile(samples, 200)), request(samples[None]),
        request(samples, 100), InferenceRequest({}, {"sample_rate_hz": 24000}), InferenceRequest({"audio": samples}),
    ])  # fmt: skip
    assert isinstance(answers[1], dict)
    assert all(isinstance(answer, UserError) for index, answer in enumerate(answers) if index != 1)
    codes = [answer.code for answer in answers if isinstance(answer, UserError)]
    assert codes[:4] == ["audio_silent", "audio_too_short", "audio_not_finite", "audio_too_long"]


def test_a_failure_in_the_middle_of_a_batch_is_the_culprits_only(checkpoint, monkeypatch):
    model = fresh(checkpoint)
    encode = model.semantic.encode

    def failing(rows):
        if any(len(row) > 30000 for row in rows):
            raise RuntimeError("bad row")
        return encode(rows)

    monkeypatch.setattr(model.semantic, "encode", failing)
    good, bad = model.infer([request(noise(0.5)), request(noise(3.0))])
    assert isinstance(good, dict)
    assert isinstance(bad, RuntimeError)


def test_the_same_recording_is_computed_once(checkpoint, monkeypatch):
    model = fresh(checkpoint, cache_entries=2)
    calls: list[int] = []
    compute = model._compute
    monkeypatch.setattr(model, "_compute", lambda items: calls.append(len(items)) or compute(items))
    first, second = request(noise(0.5, 1)), request(noise(0.5, 2))
    model.infer([first, first, second])
    again = model.infer([second, first])
    assert calls == [2]
    assert not again[0]["linguistic"].flags.writeable
    model.infer([request(noise(0.5, 3))])
    model.infer([first])
    model.infer([second])
    assert calls == [2, 1, 1]  # the third recording pushed out `second`, the least recently used


def test_another_rate_or_option_is_another_recording(model):
    samples = noise(0.5, 7)
    answers = model.infer([request(samples), request(samples, 16000), request(samples, trim_before_mel=True)])
    assert len({answer["prompt_mel"].shape for answer in answers}) == 3


def test_the_mel_can_be_trimmed_like_the_codes(model):
    quiet, loud = np.zeros(24000, np.float32), noise(1.0)
    padded = np.concatenate([quiet, loud, quiet])
    published, trimmed = model.infer([request(padded), request(padded, trim_before_mel="true")])
    assert np.array_equal(published["semantic"], trimmed["semantic"])
    assert len(published["prompt_mel"]) == 150
    assert abs(len(trimmed["prompt_mel"]) - 2 * len(trimmed["semantic"])) <= 3


def test_settings_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("EDITX_TOKENIZER_CACHE_ENTRIES", "3")
    monkeypatch.setenv("EDITX_TOKENIZER_TRIM_BEFORE_MEL", "true")
    settings = TokenizerSettings()
    assert (settings.cache_entries, settings.trim_before_mel) == (3, True)
