"""Every stage of the post-training on the tiny checkpoint, end to end, and once more from what it left."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from editx.training import EngineRollouts, Served
from services.trainer.core.sampling import Vocabulary
from services.trainer.ppo.rollouts import Prompt
from services.trainer.recipes.post_train import config as forms
from services.trainer.recipes.post_train.config import FORMS
from services.trainer.recipes.post_train.material import Item, Material
from services.trainer.recipes.post_train.stages import STAGES, PostTrain
from shared.audio.io import Waveform
from shared.checkpoints import Checkpoint
from shared.checkpoints.verify import verify
from shared.codes import split
from shared.errors import UserError
from tests.services.trainer.conftest import random_codes
from tests.services.trainer.test_data import RATE, tone

MANNERS = {"neutral": 1.0, "emotion/happy": 1.35, "emotion/sad": 0.75, "style/gentle": 0.9, "style/whisper": 1.15}


def items(groups: range, speaker: str) -> list[Item]:
    made = []
    for group in groups:
        for place, (manner, factor) in enumerate(MANNERS.items()):
            hertz = (120 + 7 * (group % 5)) * factor
            made.append(Item(
                id=f"{speaker}{group}x{place}", group=group, text=f"sentence {speaker} {group}", language="en",
                speaker=f"{speaker}{group % 3}", manner=manner, mixed=random_codes(4, group * 10 + place),
                audio=lambda hertz=hertz: Waveform(tone(0.5, hertz), RATE),
            ))  # fmt: skip
    return made


@pytest.fixture(scope="module")
def post(checkpoint: Checkpoint, tmp_path_factory):
    served = Served()
    material = Material(items(range(20), "train"), items(range(20, 23), "bench"), "CC0-1.0", "tones")
    yield PostTrain(forms.tiny(), checkpoint, tmp_path_factory.mktemp("post"), served, material)
    served.close()


def test_all_stages_run_and_leave_checkpoints_that_verify(post: PostTrain) -> None:
    post.run()
    assert [stage for stage in STAGES if not post.work.is_done(stage)] == ["measure"]
    for name in ("sft_unfiltered", "sft_large_margin", "ppo"):
        assert verify(Checkpoint(post.work.checkpoint(name))).ok, name
    data = post.work.summary("data")
    assert data["unfiltered"]["rows"] == data["large_margin"]["rows"]
    assert data["cases"] == 2
    report = (post.root / "evaluation" / "report.md").read_text()
    assert all(name in report for name in ("base", "sft_unfiltered", "sft_large_margin", "ppo"))
    assert {"accuracy", "calibration_error"} <= post.work.summary("reward")["held_out"].keys()
    assert {"picked", "random", "gain"} <= post.work.summary("reward")["best_of"].keys()
    assert (post.root / "margins.png").exists()
    assert (post.root / "runs" / "ppo" / "curves.png").exists()


def test_stages_that_are_done_are_not_done_again(post: PostTrain) -> None:
    post.run()
    before = (post.root / "checkpoints" / "ppo" / "editx.json").stat().st_mtime_ns
    PostTrain(post.config, post.base, post.root, post.serve).run()
    assert (post.root / "checkpoints" / "ppo" / "editx.json").stat().st_mtime_ns == before


def test_the_recordings_are_measured_afterwards(post: PostTrain) -> None:
    class Measures:
        def measure(self, text, language, reference, audio):
            return {"word_errors": 1.0, "words": 4.0, "similarity": 0.9, "naturalness": 3.0}

    replace(post, measures=Measures()).run()
    report = (post.root / "evaluation" / "report.md").read_text()
    assert "| 25.0 | 0.900 | 3.00 |" in report


def test_a_stage_without_its_material_says_what_to_do(post: PostTrain, tmp_path: Path) -> None:
    bare = PostTrain(post.config, post.base, tmp_path, post.serve)
    with pytest.raises(UserError, match="needs recordings"):
        bare.run(["judges"])
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
