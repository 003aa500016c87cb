"""The semantic tokenizer's training: Whisper's layers below it, excerpts, gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.trainer.recipes.nano import semantic
from services.trainer.recipes.nano.features import Store
from shared.audio.features import whisper_log_mel
from shared.checkpoints.layout import Checkpoint
from shared.checkpoints.tokenizer import load_linguistic
from shared.models.semantic import WhisperSemanticEncoder
from tests.fixtures.whisper import random_whisper

NANO = Path(__file__).resolve().parents[4] / "models" / "nano"
RECIPE = replace(semantic.CPU, batch=3, seconds=1.2)


class Readings(Store):
    """Buzzes of 0.9 and 2.1 s with states that count the averaged frames."""

    def __init__(self) -> None:
        self.rows = [
            {"index": k, "duration_s": s, "phonemes": [5, 6], "frames": [1, int(20 * s), int(20 * s), 1]}
            for k, s in enumerate((0.9, 2.1))
        ]

    def array(self, i: int, name: str) -> np.ndarray:
        duration_s: float = self.rows[i]["duration_s"]
        if name == "last":
            return np.tile(np.arange(int(duration_s / 0.06), dtype=np.float16)[:, None], (1, 512))
        if name == "f0":
            return np.full(int(duration_s * 100), 120, np.float16)
        time = np.arange(int(duration_s * 24_000)) / 24_000
        return (8000 * np.sin(2 * np.pi * 120 * time) * (1 + np.sin(7 * time))).astype(np.int16)


@pytest.fixture(scope="module")
def model() -> semantic.Autoencoder:
    torch.manual_seed(0)
    model = semantic.Autoencoder(16)
    semantic.fill_trunk(model.encoder, random_whisper())
    return model


def test_the_trunk_is_whispers_first_layers() -> None:
    encoder, whisper = WhisperSemanticEncoder(semantic.CONFIG), random_whisper()
    semantic.fill_trunk(encoder, whisper)
    feats = torch.randn(2, 80, 122, generator=torch.Generator().manual_seed(0))
    found = encoder.trunk(feats, torch.tensor([122, 122]))[1]
    torch.testing.assert_close(found, whisper(feats, middle=semantic.CONFIG.layers)[0], atol=1e-4, rtol=1e-4)


def test_excerpts_begin_where_all_rates_meet_and_end_with_the_reading() -> None:
    heard, mel, target = semantic.draw(Readings(), RECIPE, np.random.default_rng(4))
    assert (heard.shape, mel.shape) == ((3, 19_200), (3, 60, 80))
    assert (target.teacher.shape, target.phonemes.shape) == ((3, 20, 512), (3, 30))
    lengths = target.real.sum(1)
    assert set(lengths.tolist()) == {44, 60}, "0.9 s, and a piece of the longer one"
    for row, length in enumerate(lengths.tolist()):
        assert not target.real[row, length:].any()
        first = target.teacher[row, 0, 0]
        assert int(first) % 2 == 0, "a state is 60 ms, an excerpt begins every 120 ms"
        assert torch.equal(target.teacher[row, : length // 3, 7], first + torch.arange(length // 3))
        assert bool((target.phonemes[row, : length // 2] >= 0).all())
        assert bool((target.phonemes[row, length // 2 :] == -100).all())


@pytest.mark.parametrize("quantized", [False, True])
def test_everything_but_whispers_layers_learns(model: semantic.Autoencoder, quantized: bool) -> None:
    heard, mel, target = semantic.draw(Readings(), RECIPE, np.random.default_rng(4))
    units = torch.randn(3, 19, 16, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    losses: dict[str, Any] = model(whisper_log_mel(heard, bins=80), units, mel, target, quantized)
    assert all(bool(value.isfinite()) for value in losses.values())
    assert (float(losses["used"]) > 0) == quantized
    sum(losses[name] for name in ("mel", "pitch", "voicing", "teacher", "phoneme")).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("encoder.trunk."), name


def test_what_lies_past_a_reading_changes_nothing(model: semantic.Autoencoder) -> None:
    heard, mel, target = semantic.draw(Readings(), RECIPE, np.random.default_rng(4))
    row = int(target.real.sum(1).argmin())
    units = torch.randn(3, 19, 16, generator=torch.Generator().manual_seed(1))
    feats, length = whisper_log_mel(heard, bins=80), int(target.real[row].sum())
    other, wrong = feats.clone(), mel.clone()
    other[row, :, 2 * length :] = 3.0
    wrong[row, length:] = 5.0
    model.eval()
    with torch.no_grad():
        before, after = model(feats, units, mel, target, False), model(other, units, wrong, target, False)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)


def test_units_of_a_release_are_its_centroids() -> None:
    units = semantic.open_units(str(NANO), torch.device("cpu"))
    audio = torch.randn(2, 19_200, generator=torch.Generator().manual_seed(2)) / 10
    found, centroids = units(audio), torch.from_numpy(np.load(Checkpoint.resolve(NANO).centroids_file))
    assert found.shape == (2, 20, 192), "1.2 s, one for 60 ms"
    codes = load_linguistic(Checkpoint.resolve(NANO)).encode([audio[1]])[0]
    assert torch.equal(found[1], centroids[torch.from_numpy(codes).long()])


def test_the_codebook_starts_from_what_is_heard(model: semantic.Autoencoder) -> None:
    with pytest.raises(RuntimeError), torch.no_grad():
        model.codebook.fit(torch.zeros(2, 3))
    semantic.fit_codebook(model, Readings(), replace(RECIPE, batch=40), torch.device("cpu"))
    torch.testing.assert_close(model.codebook.centroids.norm(dim=1), torch.ones(4096))
