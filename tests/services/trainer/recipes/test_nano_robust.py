"""Robust tokenizers: the teacher is the release, clean speech keeps its codes, and only the encoders change."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from services.trainer.recipes.nano import robust
from services.trainer.recipes.nano.run import Run
from shared.checkpoints import manifest
from shared.checkpoints.layout import Checkpoint
from shared.checkpoints.tokenizer import load_linguistic, load_semantic

NANO = Checkpoint.resolve(Path(__file__).resolve().parents[4] / "models" / "nano")
TINY = {
    kind: dataclasses.replace(recipe, steps=2, batch_s=3.0, clean=0.4, noisy=0.3)
    for kind, recipe in robust.RECIPES.items()
}


def buzz(seconds: float, pitch: float) -> np.ndarray:
    """Harmonics that come and go, 24 kHz."""
    time = np.arange(int(seconds * 24_000)) / 24_000
    wave = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 30))
    return np.asarray(0.1 * wave * (1 + np.sin(2 * np.pi * 3 * time)), np.float32)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four readings of the teacher, one of them held out, and two of a virtual speaker."""
    monkeypatch.setenv("EDITX_DATA", str(tmp_path))
    monkeypatch.setattr(robust, "RECIPES", TINY)
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = []
    for index, voice in enumerate(("af_sky", "af_kore", "af_sky", "am_adam", "virtual001", "virtual002")):
        seconds = 0.6 + 0.1 * index
        soundfile.write(folder / f"{index:07d}.flac", buzz(seconds, 100 + 20 * index), 24_000, subtype="PCM_16")
        rows.append({"index": index, "voice_name": voice, "held_out": voice == "af_kore", "duration_s": seconds})
    (folder / "manifest-0-of-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("kind", list(robust.KINDS))
def test_the_teacher_gives_the_codes_of_the_release(corpus: Path, kind: str) -> None:
    readings = robust.Readings.of_corpus(held_out=False, longest_s=9.0)
    assert len(readings) == 5, "without the held-out voice"
    lessons = robust.Lessons(robust.KINDS[kind](NANO).eval(), readings, TINY[kind])
    released = load_linguistic(NANO) if kind == "linguistic" else load_semantic(NANO)
    for i in range(len(readings)):
        assert lessons.target(i)[1].tolist() == released.encode([torch.from_numpy(readings.audio(i))])[0].tolist()


@pytest.mark.parametrize("kind", list(robust.KINDS))
def test_what_lies_past_a_readings_end_is_not_learned(corpus: Path, kind: str) -> None:
    teacher = robust.KINDS[kind](NANO).eval()
    lessons = robust.Lessons(teacher, robust.Readings.of_corpus(held_out=False, longest_s=9.0), TINY[kind])
    lesson = lessons.draw(np.random.default_rng(2))
    assert 0 < int(lesson.clean.sum()) < len(lesson.clean)
    assert (lesson.codes >= 0).sum(1).tolist() == teacher.frames(lesson.lengths).tolist()
    past = torch.arange(lesson.heard.shape[1]) >= lesson.lengths[:, None]
    other = lesson._replace(heard=torch.where(past, torch.rand_like(lesson.heard), lesson.heard))
    found, again = (robust.losses(teacher, some, TINY[kind]) for some in (lesson, other))
    torch.testing.assert_close(found, again)


def test_a_clean_reading_differs_in_level_alone() -> None:
    recipe, rng = TINY["linguistic"], np.random.default_rng(0)
    speech = buzz(0.5, 120.0)
    played, clean = robust.heard(speech, 0.0, recipe, rng, lambda: speech)
    assert clean
    np.testing.assert_allclose(played * (speech.max() / played.max()), speech, atol=1e-6)
    noisy, clean = robust.heard(speech, recipe.clean, recipe, rng, lambda: speech)
    assert not clean
    assert float(np.abs(noisy).max()) == pytest.approx(0.999)


def test_the_released_files_stay_but_for_the_trained_encoder(corpus: Path) -> None:
    robust.train("linguistic", NANO, None, None)
    target = corpus / "robust"
    robust.export(NANO, target)
    assert Run("robust-linguistic", {}, 0).step == 2
    before, after = manifest.read(NANO.root), manifest.read(target)
    assert before is not None
    assert after is not None
    assert before.keys() == after.keys()
    changed = {Path(name).name for name in before if before[name] != after[name]}
    assert changed == {"editx.json", "model.safetensors"} | (changed & {"am.mvn", "config.yaml"})
    written = Checkpoint.resolve(target)
    assert torch.equal(load_linguistic(written).centroids, load_linguistic(NANO).centroids)
    assert torch.equal(load_linguistic(written).cmvn, load_linguistic(NANO).cmvn)
    assert json.loads((target / "editx.json").read_text())["steps"]["robust-linguistic"] == 2
    with pytest.raises(SystemExit, match="name another folder"):
        robust.export(NANO, target)


def test_the_release_measured_against_itself_keeps_every_code_but_in_noise(corpus: Path) -> None:
    equal = robust.measure(NANO, NANO)
    assert equal["clean"] == (100.0, 100.0)
    assert equal["0 dB"] < equal["clean"]
