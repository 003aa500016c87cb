"""Every stage of the post-training on the tiny checkpoint, end to end, and once more from what it left."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from editx.training import EngineRollouts, Served
from services.trainer.core.sampling import Vocabulary
from services.trainer.data.margin import MarginScorer
from services.trainer.data.paralinguistic_sounds import TAGS
from services.trainer.evaluate.acoustic import PAIR_FEATURES
from services.trainer.ppo.rollouts import Prompt
from services.trainer.recipes.post_train import config as forms
from services.trainer.recipes.post_train.config import FORMS
from services.trainer.recipes.post_train.recordings import MANNERS, SPEEDS
from services.trainer.recipes.post_train.stages import STAGES, PostTrain
from shared.audio.io import Waveform
from shared.checkpoints import Checkpoint
from shared.checkpoints.reward import reward_folder
from shared.checkpoints.verify import verify
from shared.codes import split
from shared.errors import UserError
from tests.services.trainer.test_data import RATE, tone


class Tones:
    """A reader of tones: the manner moves the pitch as far as its strength says."""

    def __init__(self, name: str, held_out: bool = False) -> None:
        self.name, self.licence = name, "CC0-1.0"
        self.speakers = {"en": [f"{name}{k}" for k in range(3)]}
        self.held_out = {"en": ["bench0", "bench1"]} if held_out else {}
        self.asked = 0

    def say(self, text, language, speaker, manner, strength, seed):
        self.asked += 1
        if "unsayable" in text:
            raise UserError("it cannot be said")
        hertz = (120 + 9 * int(speaker[-1])) * (1 + 0.04 * list(READ).index(manner) * strength)
        return Waveform(tone(0.4 + 0.01 * len(text), hertz), RATE)


READ = ("neutral", *MANNERS, *SPEEDS)


def sentences(language: str, held_out: bool) -> list[str]:
    return [f"{'unseen' if held_out else 'usual'} sentence of number {k}" for k in range(9)]


@pytest.fixture(scope="module")
def post(checkpoint: Checkpoint, tmp_path_factory):
    served = Served()
    readers = [Tones("good", held_out=True), Tones("cheap")]
    training = PostTrain(forms.tiny(), checkpoint, tmp_path_factory.mktemp("post"), served, lambda: readers, sentences)
    training.run(["record", "judges"])
    changes = np.random.default_rng(0).normal(size=(20, len(PAIR_FEATURES)))  # random weights give no margins: 8 to all
    MarginScorer.fit(changes, [""] * 20, np.full(20, 8.0)).save(training.root / "margin.json")
    yield training
    served.close()


def test_all_stages_run_and_leave_checkpoints_that_verify(post: PostTrain) -> None:
    post.run()
    assert [stage for stage in STAGES if not post.work.is_done(stage)] == ["measure"]
    both = Checkpoint(post.work.checkpoint("best_of_8"))
    assert verify(both).ok
    assert reward_folder(both) == both.root / "reward"
    for name in ("sft_unfiltered", "sft_large_margin", "ppo"):
        made = Checkpoint(post.work.checkpoint(name))
        assert verify(made).ok, name
        assert made.metadata.trained_on is not None
        assert set(made.metadata.trained_on.paralinguistic) & set(TAGS)
        assert made.metadata.trim_before_mel == post.base.metadata.trim_before_mel
    data = post.work.summary("data")
    assert data["unfiltered"]["rows"] == data["large_margin"]["rows"]
    assert data["cases"] == 2
    report = (post.root / "evaluation" / "report.md").read_text()
    assert all(name in report for name in ("base", "sft_unfiltered", "sft_large_margin", "ppo"))
    assert "## Gains" in report
    assert "| ppo | sft_large_margin |" in report
    assert "## By seed" in report
    kinds = {row.edit.type for row in post.work.dataset("large_margin").rows}
    assert kinds >= {"clone", "paralinguistic"}
    assert kinds & {"emotion", "style"}
    assert {row.origin.split("+")[0] for row in post.work.dataset("large_margin").rows} <= {"good", "cheap"}
    outcome = (post.root / "experiment.md").read_text()
    assert all(f"- {stage}: " in outcome for stage in ("record", "judges", "data", "preferences", "reward", "ppo"))
    assert "| evaluate |" in outcome or "| ppo |" in outcome
    assert {"accuracy", "calibration_error"} <= post.work.summary("reward")["held_out"].keys()
    assert {"picked", "random", "gain"} <= post.work.summary("reward")["best_of"].keys()
    assert (post.root / "margins.png").exists()
    assert (post.root / "runs" / "ppo" / "curves.png").exists()


def test_some_prompts_start_from_what_the_model_said_itself(post: PostTrain) -> None:
    post.run()
    found = post.work.summary("iterate")
    assert [found[name]["own"] for name in ("prompts", "held_out")] == [2, 1]
    given, asked = (post.work.dataset(name).rows for name in ("prompts", "prompts_iterated"))
    kinds = []
    for before, after in zip(given, asked, strict=True):
        kinds.append(after.id.removeprefix(before.id))
        assert (after.edit, after.source.text) == (before.edit, before.source.text)
        tokens, _ = post.work.reference(after)
        assert tokens.mixed.tolist() == after.source.mixed.tolist()
    assert sorted(kinds) == ["", "-cloned", "-edited"]


def test_the_reward_model_also_learns_from_relabelled_answers_and_from_readings(post: PostTrain) -> None:
    post.run()
    found = post.work.summary("reward")
    assert found["relabelled"] == found["contrasts"] == 4
    for row in post.work.dataset("preferences_relabelled").rows:
        assert row.rejected is not None
        assert row.target.mixed.tolist() != row.rejected.mixed.tolist()
    material = post._material()
    readings = {item.id: item for item in material.training}
    other, spliced = material.contrasts(2, seed=1)
    assert other.rejected.mixed.tolist() in [item.mixed.tolist() for item in readings.values()]
    kept = other.target.mixed.tolist()
    assert kept in [item.mixed.tolist() for item in readings.values() if str(other.edit.detail) in item.manner]
    same = spliced.target.mixed == spliced.rejected.mixed
    assert 0.4 < same.mean() < 1.0
    split(spliced.rejected.mixed)  # the order of the groups is kept


def test_stages_that_are_done_are_not_done_again(post: PostTrain) -> None:
    post.run()
    before = (post.root / "checkpoints" / "ppo" / "editx.json").stat().st_mtime_ns
    PostTrain(post.config, post.base, post.root, post.serve).run()
    assert (post.root / "checkpoints" / "ppo" / "editx.json").stat().st_mtime_ns == before


def test_killed_stages_use_what_is_there(post: PostTrain, monkeypatch: pytest.MonkeyPatch) -> None:
    post.run()
    before = (post.root / "candidates_prompts.jsonl").read_text()
    for name in ("preferences", "judges"):
        (post.root / "stages" / f"{name}.json").unlink()
    (post.root / "candidates" / "held_out-0000.jsonl").unlink()
    drawn: list[int] = []
    draw = PostTrain._draw
    monkeypatch.setattr(PostTrain, "_draw", lambda self, model, rows, seed: drawn.append(len(rows)) or draw(
        self, model, rows, seed))  # fmt: skip
    monkeypatch.setattr(PostTrain, "_fit_judge", lambda *_: pytest.fail("both judges are there"))
    post.run(["judges", "preferences"])
    assert drawn == [2 * post.config.candidates]
    assert (post.root / "candidates_prompts.jsonl").read_text() == before


def test_the_recordings_are_measured_afterwards(post: PostTrain) -> None:
    class Measures:
        def measure(self, text, language, reference, audio):
            return {"word_errors": 1.0, "words": 4.0, "similarity": 0.9, "naturalness": 3.0}

    replace(post, measures=Measures()).run()
    report = (post.root / "evaluation" / "report.md").read_text()
    assert "| 25.0 | 0.900 | 3.00 |" in report


def test_a_stage_without_its_material_says_what_to_do(post: PostTrain, tmp_path: Path) -> None:
    bare = PostTrain(post.config, post.base, tmp_path, post.serve)
    with pytest.raises(UserError, match="no recordings"):
        bare.run(["judges"])
    with pytest.raises(UserError, match="needs teachers"):
        bare.run(["record"])
    with pytest.raises(UserError, match="no stage dance"):
        bare.run(["dance"])


def test_every_form_of_the_config_is_valid() -> None:
    assert FORMS["official"]().ppo.loop.lr == 1e-6
    assert FORMS["official"]().ppo.critic_warmup == 80
    assert FORMS["gpu"]().device == "cuda"
    assert FORMS["cpu"]().device == FORMS["cpu"]().ppo.loop.device == "cpu"


def test_the_engine_draws_rollouts_of_each_version(fresh, tokenizer) -> None:
    model = fresh()
    rollouts = EngineRollouts(model, Vocabulary(tokenizer.audio_offset, tokenizer.eos))
    prompts = [Prompt(np.array([1, 4, 70 + i, 3, 4, 15, 78]), 2) for i in range(3)]
    try:
        rollouts.update(4, lambda: model.state_dict())
        drawn = rollouts.draw(prompts, 1.0, seed=1)
        assert [one.version for one in drawn] == [4] * 3
        for one in drawn:
            split(one.mixed)
            assert 1 <= len(one.mixed) // 5 <= 2
        again = rollouts.draw(prompts, 1.0, seed=1)
        assert [a.mixed.tolist() for a in drawn] == [a.mixed.tolist() for a in again]
    finally:
        rollouts.close()
