"""What is recorded for a post-training: a plan from the seed, shards that survive a kill, nothing lost silently."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.trainer.data.emotion_texts import fits, fitting
from services.trainer.data.paralinguistic_sounds import TAGS
from services.trainer.recipes.nano.teacher import MANNERS as MOVES
from services.trainer.recipes.nano.teacher import blend
from services.trainer.recipes.post_train.recordings import RecordConfig, load, plan, record
from shared.errors import UserError
from tests.services.trainer.test_data import tokenize
from tests.services.trainer.test_post_train import Tones, sentences

CONFIG = RecordConfig(groups=24, benchmark_groups=4, teacher_share=0.5, shard_groups=5)


def readers() -> list[Tones]:
    return [Tones("good", held_out=True), Tones("cheap")]


def test_the_plan_follows_the_seed_and_keeps_the_benchmark_apart() -> None:
    groups = plan(CONFIG, readers(), sentences, 3)
    assert groups == plan(CONFIG, readers(), sentences, 3) != plan(CONFIG, readers(), sentences, 4)
    training, benchmark = groups[:24], groups[24:]
    assert {group.reader for group in training} == {0, 1}
    assert all(group.is_benchmark and group.speaker.startswith("bench") for group in benchmark)
    assert {g.text for g in training}.isdisjoint(g.text for g in benchmark)
    assert {group.tag for group in training} == {None, *TAGS}
    strengths = [s for group in training for manner, s in group.readings if manner.startswith(("emotion", "style"))]
    assert min(strengths) >= CONFIG.weakest
    assert max(strengths) <= CONFIG.strongest
    assert max(strengths) - min(strengths) > 0.5
    with pytest.raises(UserError, match="no sentences"):
        plan(CONFIG, readers(), lambda language, held_out: [], 0)


def test_a_text_fits_the_first_emotion_that_it_is_read_in() -> None:
    known = ["He smiled.", "She wept.", "The door is green.", "我今天很高兴。", "他哭了。"]
    assert fitting(known, "happy") == ["He smiled.", "我今天很高兴。"]
    assert fitting(known, "sad") == ["She wept.", "他哭了。"]
    assert fitting(known, "admiration") == known
    assert not fits("Madame Curie", "angry")
    groups = plan(CONFIG, readers(), lambda language, held_out: [*known, *sentences(language, held_out)], 0)
    for group in groups[:24]:
        first = next((m for m, _ in group.readings if m.startswith("emotion/")), "")
        if first in ("emotion/happy", "emotion/sad"):
            assert fits(group.text, first.removeprefix("emotion/"))


def test_a_killed_recording_goes_on_with_the_next_shard(tmp_path: Path) -> None:
    voices = readers()
    groups = plan(CONFIG, voices, sentences, 0)

    class Killed(BaseException):
        pass

    def stop(fraction: float, note: str) -> None:
        if fraction > 0.3:
            raise Killed

    with pytest.raises(Killed):
        record(groups, voices, tokenize, tmp_path, CONFIG, workers=1, progress=stop)
    asked = sum(voice.asked for voice in voices)
    (tmp_path / "shard-00002.partial").mkdir()
    summary = record(groups, voices, tokenize, tmp_path, CONFIG, workers=2)
    again = readers()
    whole = record(groups, again, tokenize, tmp_path / "whole", CONFIG, workers=1)
    assert asked < sum(voice.asked for voice in voices) == sum(voice.asked for voice in again)
    assert summary == whole
    assert summary["left_out"] == 0
    one, other = load(tmp_path), load(tmp_path / "whole")
    for ours, theirs in zip([*one.training, *one.benchmark], [*other.training, *other.benchmark], strict=True):
        assert ours.id == theirs.id
        np.testing.assert_array_equal(ours.mixed, theirs.mixed)
        np.testing.assert_array_equal(ours.audio().samples, theirs.audio().samples)
    assert {item.origin for item in one.training} == {"good", "cheap"}


def test_material_holds_every_kind_of_row(tmp_path: Path) -> None:
    config = replace(CONFIG, groups=60)
    record(plan(config, readers(), sentences, 0), readers(), tokenize, tmp_path, config, workers=1)
    material = load(tmp_path)
    kinds = {row.edit.type for row in material.rehearsal(100, 0)}
    assert kinds == {"speed", "denoise", "vad"}
    sounds = material.sounds(100, 0)
    assert sounds
    assert all(row.source.text != row.target.text == row.edit.target_text for row in sounds)
    assert all(row.origin.endswith("+made-sounds") for row in sounds)
    assert material.clones(5, 0).rows
    parts = [{item.group for item in material.part(part)} for part in ("judge_a", "judge_b", "held_out", "sft")]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_what_cannot_be_said_is_counted_with_its_reason(tmp_path: Path, caplog) -> None:
    voices = readers()
    bad = [replace(group, text="an unsayable one") if group.number == 2 else group
           for group in plan(CONFIG, voices, sentences, 0)]  # fmt: skip
    summary = record(bad, voices, tokenize, tmp_path, CONFIG, workers=1)
    assert summary["left_out"] == 1
    assert "group 2" in summary["why"][0]
    assert "it cannot be said" in summary["why"][0]
    assert "left out: group 2" in caplog.text


def test_an_empty_folder_has_no_recordings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no recordings"):
        load(tmp_path)


def test_a_manner_is_blended_from_nothing_to_itself() -> None:
    whisper, happy = MOVES["style/whisper"], MOVES["emotion/happy"]
    assert blend(happy, 0.0) == MOVES["neutral"]
    assert blend(happy, 1.0) == happy
    assert 1 < blend(happy, 0.5).f0_range < happy.f0_range
    assert [blend(whisper, strength).whisper for strength in (0.4, 0.5)] == [False, True]
