"""From texts to a better policy by single commands, each as documented: sets, split, candidates, judge, preferences,
reward model, hardest prompts, PPO with a held-out judge, benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from editx.cli.app import run
from services.trainer.data import specs
from services.trainer.data.checks import HeldOut, check_leaks
from services.trainer.data.manifest import Dataset, collect
from services.trainer.data.preferences import read_ratings
from services.trainer.data.splits import split
from services.trainer.evaluate.acoustic import FEATURES, AcousticJudge, Classifier
from shared.audio.io import Waveform, write_audio
from shared.errors import UserError
from tests.fixtures.tiny import with_reward
from tests.services.trainer.conftest import make_row
from tests.services.trainer.test_data import RATE, Voice, tone


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out.strip()


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run(arguments) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    """An acoustic judge of happy and sad that hears noise."""
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(30, len(FEATURES))), ["happy", "sad", "neutral"] * 10
    AcousticJudge({"emotion": Classifier.fit(x, labels)}).save(tmp_path / "judge.json")
    return tmp_path / "judge.json"


@pytest.fixture
def prompts(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prompts by a teacher of tones, with their recordings."""
    monkeypatch.setattr(specs.build_spec, "__defaults__", (Voice,))
    texts = [{"text": f"a {tag} one {k}", "language": "en", "manner": f"emotion/{tag}"}
             for tag in ("happy", "sad") for k in range(3)]  # fmt: skip
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    spec = {"kind": "triplets", "name": "prompts", "texts": "texts.jsonl", "speakers": {"en": ["ann", "bob", "eve"]},
            "count": 8, "unfiltered": True, "keep_audio": True}  # fmt: skip
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump(spec))
    made = said(["data", "build", str(tmp_path / "prompts.yaml"), "--out", str(tmp_path / "sets"), "--checkpoint",
                 str(tiny), "--json"], capsys)  # fmt: skip
    return Path(json.loads(made)["folder"])


def test_prompts_become_preferences_and_hardest_prompts(
    prompts: Path, judge: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers"
    draw = ["data", "candidates", str(prompts), "--out", str(out), "--checkpoint", str(tiny), "--count", "3", "--steps",
            "1"]  # fmt: skip
    count = len(Dataset.load(prompts).rows)
    assert f"{3 * count} candidates for {count} prompts" in said(draw, capsys)
    lines = (out / "candidates.jsonl").read_text().splitlines(keepends=True)
    (out / "candidates.jsonl").write_text("".join(lines[:-3]))
    assert f"{3 * count} candidates" in said(draw, capsys)
    assert (out / "candidates.jsonl").read_text() == "".join(lines)
    assert "holds candidates of other prompts" in refused([*draw, "--temperature", "0.1"], capsys)

    ratings = tmp_path / "rated" / "ratings.jsonl"
    ask = ["data", "judge", str(out / "candidates.jsonl"), "--judge", str(judge), "--out", str(ratings)]
    assert f"{3 * count} ratings by acoustic, 0 of edits" in said(ask, capsys)
    assert "0 ratings by acoustic" in said(ask, capsys)
    assert {one.scale for one in read_ratings(ratings)} == {10}

    spec = {"kind": "preferences", "name": "preferences", "rows": str(prompts), "ratings": ["rated/ratings.jsonl"],
            "candidates": "answers/candidates.jsonl", "preference_margin": 1e-6}  # fmt: skip
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(spec))
    built = json.loads(
        said(["data", "build", str(tmp_path / "p.yaml"), "--out", str(tmp_path / "sets"), "--json"], capsys)
    )
    pairs = Dataset.load(Path(built["folder"]))
    assert all(row.rejected is not None and row.rated_by == "acoustic" for row in pairs.rows)
    assert pairs.recording(pairs.rows[0], pairs.rows[0].source).is_file()

    keep = ["data", "hardest", str(prompts), "--candidates", str(out / "candidates.jsonl"), "--ratings", str(ratings),
            "--out", str(tmp_path / "sets")]  # fmt: skip
    hard = Dataset.load(Path(said(keep, capsys)))
    assert (hard.name, len(hard.rows)) == ("prompts-hardest", round(count / 2))
    rated: dict[str, list[float]] = {row.id: [] for row in Dataset.load(prompts).rows}
    for one in read_ratings(ratings):
        rated[one.candidate.rpartition(".")[0]].append(one.correctness)
    mean = {id: float(np.mean(values)) for id, values in rated.items()}
    kept = {row.id for row in hard.rows}
    assert max(mean[id] for id in kept) <= min(mean[id] for id in mean.keys() - kept)
    ratings.write_text(ratings.read_text().splitlines(keepends=True)[0])
    assert "was rated" in refused(keep, capsys)
    next((out / "audio").iterdir()).unlink()
    assert "there is no recording" in refused(ask, capsys)


def test_a_held_out_judge_watches_ppo(
    prompts: Path, judge: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored = with_reward(tiny, tmp_path / "scored")
    sizes = ["steps=3", "critic_warmup=1", "prompts_per_step=2", "samples_per_prompt=1", "max_stretch=0.5",
             "extra_groups=1", "watch_every=1"]  # fmt: skip
    entries = [word for size in sizes for word in ("--set", size)]
    train = ["train", "ppo", "--data", str(prompts), "--base", str(tiny), "--reward", str(scored), "--judge",
             str(judge), "--out", str(tmp_path / "run"), *entries]  # fmt: skip
    assert "Give held_out" in refused(train, capsys)
    watched = [*train, "--held-out", str(prompts), "--gate", "judge_gain=-1"]
    measures = json.loads(said(watched, capsys))
    assert -1 <= measures["judge_gain"] <= 1
    checks = json.loads((tmp_path / "run" / "run" / "checks.json").read_text())
    assert [one["step"] for one in checks] == [0, 1, 2]
    assert all(0 <= one["judge"] <= 1 and "divergence" in one for one in checks)
    assert (tmp_path / "run" / "run" / "reward_and_judge.png").exists()
    other = tmp_path / "other.json"
    other.write_text(judge.read_text().replace("happy", "fear"))
    assert "other data" in refused([*watched, "--judge", str(other)], capsys)
    bare = tmp_path / "bare.jsonl"
    bare.write_text(make_row(0).model_dump_json() + "\n")
    told = refused([*watched, "--held-out", str(bare), "--out", str(tmp_path / "bare")], capsys)
    assert "no recording of row row-0" in told


def test_candidates_need_the_recordings_of_their_prompts(
    tiny: Path, judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(make_row(0).model_dump_json() + "\n")
    told = refused(["data", "candidates", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out"), "--checkpoint",
                    str(tiny)], capsys)  # fmt: skip
    assert "no recording of row row-0" in told
    assert "keep_audio" in told
    (tmp_path / "none.jsonl").write_text("")
    judged = ["data", "judge", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "r.jsonl"), "--judge", str(judge)]
    assert "holds no candidates" in refused(judged, capsys)


def test_a_split_shares_nothing_and_does_not_depend_on_the_order() -> None:
    rows = [make_row(k).model_copy(update={
        "source": make_row(k).source.model_copy(update={"text": f"text {k % 10}"}),
        "target": make_row(k).target.model_copy(update={"text": f"text {k % 10}"}), "speaker": f"speaker-{k}",
    }) for k in range(20)]  # fmt: skip
    made = split(collect("set", rows), 0.2, "speaker")
    assert len(made.held_out.rows) == 4
    check_leaks(made.training.rows, [HeldOut.of("held", made.held_out.rows)])
    assert len(made.training.rows) + len(made.training.refused) == 16
    assert made.training.refused  # the same texts by other speakers
    again = split(collect("set", rows[::-1]), 0.2, "speaker")
    assert {row.id for row in again.held_out.rows} == {row.id for row in made.held_out.rows}
    by_text = split(collect("set", rows), 0.2, "text")
    assert {row.source.text for row in by_text.held_out.rows}.isdisjoint(
        row.source.text for row in by_text.training.rows
    )
    with pytest.raises(UserError, match="cannot be split by speaker"):
        split(collect("set", [make_row(0)]), 0.5, "speaker")


def test_a_benchmark_is_made_of_held_out_voices_and_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_audio(Waveform(tone(0.6), RATE), tmp_path / "v.wav", "wav")
    voice = {"id": "v1", "audio": "v.wav", "text": "a prompt", "language": "en", "speaker": "eve"}
    (tmp_path / "voices.jsonl").write_text(json.dumps(voice) + "\n")
    texts = [{"text": "so glad", "language": "en", "manner": "emotion/happy"},
             {"text": "well [Laughter] then", "language": "en"}]  # fmt: skip
    path = tmp_path / "texts.jsonl"
    make = ["eval", "make-benchmark", str(tmp_path / "voices.jsonl"), str(path), "--out", str(tmp_path / "bench"),
            "--count", "4"]  # fmt: skip

    def written(*more: dict[str, str]) -> list[str]:
        path.write_text("".join(json.dumps(line) + "\n" for line in [*texts, *more]))
        return make

    assert "2 cases" in said(written(), capsys)  # there is one voice
    cases = [json.loads(line) for line in (tmp_path / "bench" / "cases.jsonl").read_text().splitlines()]
    assert [(one["task"], one["task_sub"]) for one in cases[:2]] == [
        ("emotion", "happy"),
        ("paralinguistic", "Laughter"),
    ]
    for line, why in (
        ({"text": "plain", "language": "en"}, "row 3: the text has neither a manner"),
        ({"text": "x", "language": "en", "manner": "emotion/hapy"}, "'hapy' is no known"),
        ({"text": "x", "language": "zh", "manner": "emotion/sad"}, "no other recording of the language 'zh'"),
    ):
        assert why in refused(written(line), capsys)
