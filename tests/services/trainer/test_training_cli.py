"""The commands of post-training, run as a user runs them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from editx.cli.app import run
from services.trainer.core.runs import Silent, read_log
from services.trainer.data.manifest import collect, fetch
from services.trainer.data.margin import MarginScorer
from services.trainer.data.rated_pairs import margin_of
from services.trainer.evaluate.acoustic import FEATURES, AcousticJudge, Classifier
from services.trainer.jobs import Place
from shared import telemetry
from shared.audio.io import Waveform, write_audio
from shared.jobs.memory import MemoryJobStore
from shared.store.folder import FolderStore
from tests.services.trainer.conftest import make_row, random_codes
from tests.services.trainer.test_data import RATE, tone


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(make_row(i, margin=float(i)).model_dump_json() + "\n" for i in range(4, 10)))
    return path


def test_a_set_is_built_described_and_checked(rows: Path, tmp_path: Path, capsys) -> None:
    spec = {"kind": "rows", "name": "mine", "rows": "rows.jsonl", "threshold": 7.0}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert run(["data", "build", str(tmp_path / "spec.yaml"), "--out", str(tmp_path / "sets"), "--json"]) == 0
    built = json.loads(capsys.readouterr().out)
    assert built["rows"] == 3
    assert run(["data", "stats", built["folder"], "--json", "--picture", str(tmp_path / "m.png")]) == 0
    assert json.loads(capsys.readouterr().out)["margins"]["emotion happy"]["lowest"] == 7.0
    assert (tmp_path / "m.png").exists()
    store = f"file://{tmp_path / 'store'}"
    assert run(["data", "publish", built["folder"], "--store", store]) == 0
    prefix = capsys.readouterr().out.strip()
    assert prefix == f"datasets/mine/{built['version']}"
    assert run(["data", "fetch", prefix, "--store", store, "--out", str(tmp_path / "far")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "far" / "mine" / built["version"])
    assert "datasets/none" in refused(["data", "fetch", "datasets/none/0", "--store", store], capsys)
    bench = collect("bench", [make_row(0)]).save(tmp_path / "sets")
    assert run(["data", "check", built["folder"], "--against", str(bench)]) == 2
    assert "leaks into evaluation sets" in capsys.readouterr().err
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec | {"colour": 1}))
    assert run(["data", "build", str(tmp_path / "spec.yaml")]) == 2


def test_recordings_become_simple_edits_by_the_checkpoints_tokenizer(tiny: Path, tmp_path: Path, capsys) -> None:
    write_audio(Waveform(tone(0.8), RATE), tmp_path / "a.wav", "wav")
    line = {"id": "a", "audio": "a.wav", "text": "words", "language": "en", "speaker": "ann", "licence": "CC0-1.0",
            "origin": "tones"}  # fmt: skip
    lost = line | {"id": "b", "audio": "lost.wav"}
    (tmp_path / "r.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(lost) + "\n")
    spec = {"kind": "simple", "name": "simple", "recordings": "r.jsonl", "on_bad": "skip"}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    arguments = [
        "data",
        "build",
        str(tmp_path / "spec.yaml"),
        "--out",
        str(tmp_path),
        "--checkpoint",
        str(tiny),
        "--json",
    ]
    assert run(arguments) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 3


def test_ratings_become_preferences(rows: Path, tmp_path: Path, capsys) -> None:
    lines = [{"id": f"c{k}", "prompt": "row-4", "mixed": random_codes(2, k).tolist()} for k in range(2)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "ratings.csv").write_text("candidate,rater,correctness\nc0,ann,1\nc1,ann,5\n")
    spec = {
        "kind": "preferences",
        "name": "p",
        "rows": "rows.jsonl",
        "candidates": "c.jsonl",
        "ratings": ["ratings.csv"],
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert run(["data", "build", str(tmp_path / "spec.yaml"), "--out", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1


def test_fine_tuning_goes_on_and_publishes(rows: Path, tiny: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("EDITX_CHECKPOINTS_DIR", str(tmp_path / "home"))
    arguments = ["train", "sft", "--data", str(rows), "--held-out", str(rows), "--base", str(tiny), "--out",
                 str(tmp_path / "run"), "--set", "loop.lr=1e-3", "--set", "row_tokens=2048", "--publish", "mine",
                 "--gate", "loss_gain=0.0"]  # fmt: skip
    assert run(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["loss_gain"] > 0
    assert document["checkpoint"] == str(tmp_path / "home" / "mine")
    assert run(arguments) == 0
    assert run([*arguments, "--set", "loop.lr=2e-3"]) == 2
    assert "belongs to another config" in capsys.readouterr().err


def test_a_run_goes_on_only_from_the_same_base_and_held_out_data(
    rows: Path, tiny: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("EDITX_CHECKPOINTS_DIR", str(tmp_path / "home"))
    few = tmp_path / "few.jsonl"
    few.write_text(rows.read_text().splitlines(keepends=True)[0])

    def train(base: Path, held_out: Path) -> int:
        return run(["train", "sft", "--data", str(rows), "--held-out", str(held_out), "--base", str(base), "--out",
                    str(tmp_path / "run"), "--set", "loop.lr=1e-3", "--publish", "mine"])  # fmt: skip

    assert train(tiny, rows) == 0
    config = json.loads((tmp_path / "run" / "run" / "config.json").read_text())
    assert config["data"].keys() == {"dataset", "base", "held_out"}
    assert {"editx", "peft"} <= json.loads((tmp_path / "run" / "run" / "versions.json").read_text()).keys()
    for base, held_out in ((tmp_path / "home" / "mine", rows), (tiny, few)):
        capsys.readouterr()
        assert train(base, held_out) == 2
        assert "other data" in capsys.readouterr().err


def test_metrics_of_a_command_go_to_the_collector(rows: Path, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    told: list[str] = []

    def configure(service: str, *, otlp_endpoint: str) -> Callable[[], None]:
        told.append(f"{service} to {otlp_endpoint}")
        return lambda: told.append("end")

    monkeypatch.setattr(telemetry, "configure", configure)
    arguments = ["train", "sft", "--data", str(rows), "--base", str(tiny), "--out", str(tmp_path / "run")]
    assert run(arguments) == 0
    assert not told
    monkeypatch.setenv("EDITX_OTLP_ENDPOINT", "http://collector:4318")
    assert run(arguments) == 0
    assert told == ["trainer to http://collector:4318", "end"]


@pytest.mark.parametrize(("words", "message"), [
    (["sft", "--gate", "loss_gain=0.0"], "which is measured on held-out data"),
    (["sft", "--held-out", "ROWS", "--gate", "accuracy=0.8"], "The gate asks for accuracy, which sft does not measure"),
    (["ppo", "--held-out", "ROWS", "--gate", "judge_gain=0"], "which ppo does not measure"),
    (["dpo"], "There is no recipe 'dpo'"),
])  # fmt: skip
def test_a_job_whose_gate_can_only_fail_is_refused_when_it_is_submitted(
    words: list[str], message: str, rows: Path, capsys
) -> None:
    assert run(["train", "submit", *(str(rows) if w == "ROWS" else w for w in words), "--data", str(rows)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_submitted_job_finds_both_data_sets_in_the_store(rows: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    jobs = MemoryJobStore()
    monkeypatch.setattr("shared.wiring.open_jobs", lambda url: jobs)
    monkeypatch.setenv("EDITX_BUS_URL", "memory:")
    monkeypatch.setenv("EDITX_STORE_URL", f"file://{tmp_path / 'store'}")
    held_out = tmp_path / "held.jsonl"
    held_out.write_text(rows.read_text())
    assert run(["train", "submit", "sft", "--data", str(rows), "--held-out", str(held_out), "--gate",
                "loss_gain=0.0"]) == 0  # fmt: skip
    training = jobs.get(capsys.readouterr().out.strip()).request.training
    assert training is not None
    store = FolderStore(tmp_path / "store")
    for name, expected in (("dataset", "rows"), ("held_out", "held")):
        assert training.settings[name].startswith(f"datasets/{expected}/")
        assert len(fetch(store, training.settings[name], tmp_path).rows) == 6


def test_a_judge_travels_with_its_job(rows: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    jobs = MemoryJobStore()
    monkeypatch.setattr("shared.wiring.open_jobs", lambda url: jobs)
    monkeypatch.setenv("EDITX_BUS_URL", "memory:")
    monkeypatch.setenv("EDITX_STORE_URL", f"file://{tmp_path / 'store'}")
    rng = np.random.default_rng(0)
    judge = AcousticJudge({"emotion": Classifier.fit(rng.normal(size=(8, len(FEATURES))), ["happy", "neutral"] * 4)})
    judge.save(tmp_path / "judge.json")
    submit = ["train", "submit", "ppo", "--data", str(rows), "--held-out", str(rows), "--reward", "r", "--judge",
              str(tmp_path / "judge.json"), "--gate", "judge_gain=0"]  # fmt: skip
    assert run(submit) == 0
    training = jobs.get(capsys.readouterr().out.strip()).request.training
    assert training is not None
    key = training.settings["judge"]
    assert key.startswith("judges/")
    place = Place(tmp_path / "work", FolderStore(tmp_path / "store"), "cpu", Silent())
    heard, identity = place.judge(key)
    assert heard.hears("emotion")
    assert identity == key.removeprefix("judges/").removesuffix(".json")
    (tmp_path / "judge.json").write_text("{")
    assert "is no acoustic judge" in refused(submit, capsys)


def test_all_stages_in_a_row_refuse_several_processes(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(["train", "post", "--work", str(tmp_path / "work")]) == 2
    assert "single stages under torchrun" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "work").exists()


def refused(arguments: list[str], capsys) -> str:
    """What is said on standard error when bad input is refused."""
    assert run(arguments) == 2
    return " ".join(capsys.readouterr().err.split())


def test_margins_are_fitted_from_rated_pairs_and_bad_ones_are_named(tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for k in range(20):
        base, factor = float(rng.uniform(110, 160)), 1.0 + 0.04 * k
        for name, hertz in (("n", base), ("e", base * factor)):
            write_audio(Waveform(tone(0.4, hertz), RATE), tmp_path / f"{name}{k}.wav", "wav")
        lines.append({"id": f"p{k}", "category": "emotion happy", "rating": 1 + 9 * k / 19, "source": f"n{k}.wav",
                      "audio": f"e{k}.wav"})  # fmt: skip
    rated, out = tmp_path / "rated.jsonl", tmp_path / "margin.json"

    def write(*more: dict) -> list[str]:
        rated.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *more]))
        return ["data", "fit-margins", str(rated), "--out", str(out)]

    assert run(write()) == 0
    assert "from 20 pairs, off by" in capsys.readouterr().out
    scorer = MarginScorer.load(out)
    tones = [Waveform(tone(0.4, hertz), RATE) for hertz in (130.0, 131.0, 220.0)]
    scores = [margin_of(scorer)(tones[0], other, "emotion happy") for other in tones[1:]]
    assert scores[1] > scores[0] + 3
    for change, why in (({"audio": "lost.wav"}, "pair bad: "), ({"rating": 12}, "row 21: rating"),
                        ({"id": "p1"}, "the id 'p1' is taken"), ({"source": None}, "row 21: source")):  # fmt: skip
        assert why in refused(write(lines[0] | {"id": "bad"} | change), capsys)
    assert "cannot be read" in refused(["data", "fit-margins", str(tmp_path / "none.jsonl")], capsys)
    rated.write_text("")
    assert "no annotated pairs" in refused(["data", "fit-margins", str(rated)], capsys)


def test_what_cannot_be_rated_or_judged_is_named(tmp_path: Path, capsys) -> None:
    write_audio(Waveform(tone(0.4), RATE), tmp_path / "a.wav", "wav")
    item = {"candidate": "c", "instruction": "Louder.", "text": "words", "source": "a.wav", "audio": "a.wav"}
    path = tmp_path / "lines.jsonl"
    rate = ["data", "rate", str(path), "--rater", "ann"]
    for lines, why in (
        ([item, item | {"audio": "lost.wav"}], "row 2: there is no recording"),
        ([item, item], "twice"),
        ([{"candidate": "c"}], "row 1: instruction"),
        (["{"], "no JSON object"),
        ([], "nothing to rate"),
    ):
        path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
        assert why in refused(rate, capsys)
    assert "cannot be read" in refused([*rate[:2], str(tmp_path / "none.jsonl"), *rate[3:]], capsys)
    example = {"task": "emotion", "label": "happy", "source": "a.wav", "audio": "a.wav"}
    for lines, why in (([example, {}], "row 2: task"), ([example | {"label": "hapy"}], "'hapy' is no known emotion"),
                       ([example | {"audio": "lost.wav"}], "row 1: "), ([example], "has the labels happy"),
                       ([example | {"task": "dance"}], "row 1: "), ([], "no examples")):  # fmt: skip
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert why in refused(["eval", "fit-judge", str(path)], capsys)
    assert "cannot be read" in refused(["eval", "fit-judge", str(tmp_path / "none.jsonl")], capsys)


def test_the_benchmark_runs_with_a_fitted_judge_and_is_reported(tiny: Path, tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for k, (label, factor) in enumerate([("happy", 1.3), ("neutral", 1.0)] * 6):
        base = float(rng.uniform(110, 180))
        for name, hertz in (("s", base), ("a", base * factor)):
            write_audio(Waveform(tone(0.4, hertz), RATE), tmp_path / f"{name}{k}.wav", "wav")
        lines.append({"task": "emotion", "label": label, "source": f"s{k}.wav", "audio": f"a{k}.wav"})
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judge = tmp_path / "judge.json"
    assert run(["eval", "fit-judge", str(tmp_path / "examples.jsonl"), "--out", str(judge)]) == 0
    case = {"id": 1, "speaker": "s", "gen_text": "you know", "prompt_audio": "s0.wav", "prompt_text": "I just finished",
            "lang": "en", "task": "emotion", "task_sub": "happy"}  # fmt: skip
    (tmp_path / "bench.jsonl").write_text(json.dumps(case) + "\n")
    arguments = ["eval", "run", str(tmp_path / "bench.jsonl"), "--out", str(tmp_path / "out"), "--checkpoint",
                 str(tiny), "--judge", str(judge), "--iterations", "1", "--steps", "1"]  # fmt: skip
    assert run(arguments) == 0
    assert "| emotion | all | Iter1 | 1 |" in capsys.readouterr().out
    assert run(["eval", "report", str(tmp_path / "out"), "--out", str(tmp_path / "report")]) == 0
    asked = [*arguments[:-6], "--judge", "gemini:x"]
    assert "needs an address" in refused(asked, capsys)
    known = ["--judge-url", "http://127.0.0.1:9", "--judge-key", "k", "--judge-budget", "2"]
    assert "needs the cost of a call" in refused([*asked, *known], capsys)


def test_a_trained_reward_model_picks_candidates_and_teaches_the_policy(
    rows: Path, tiny: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("EDITX_CHECKPOINTS_DIR", str(tmp_path / "home"))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(make_row(i, rejected=True, margin=9.0).model_dump_json() + "\n" for i in range(4)))
    arguments = ["train", "reward", "--data", str(pairs), "--held-out", str(pairs), "--base", str(tiny), "--out",
                 str(tmp_path / "reward"), "--set", "loop.lr=1e-3", "--publish", "judge",
                 "--gate", "accuracy=0.0"]  # fmt: skip
    assert run(arguments) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["checkpoint"] == str(tmp_path / "home" / "judge")
    assert {"accuracy", "standard_error", "calibration_error", "accuracy category emotion happy"} <= measured.keys()
    report = json.loads((tmp_path / "reward" / "run" / "held_out.json").read_text())
    assert report["groups"]["margin from 8"]["pairs"] == 4
    write_audio(Waveform(tone(0.8), RATE), tmp_path / "in.wav", "wav")
    (tmp_path / "in.txt").write_text("well then")
    edit = ["edit", str(tmp_path / "in.wav"), "--denoise", "--checkpoint", "judge", "--n-best", "4", "--seed", "1",
            "--steps", "1", "--out", str(tmp_path / "out.wav"), "--json"]  # fmt: skip
    assert run(edit) == 0
    report = json.loads(capsys.readouterr().out)
    assert (tmp_path / "out.wav").exists()
    assert "score" in json.dumps(report)
    sizes = ["steps=2", "critic_warmup=1", "prompts_per_step=2", "samples_per_prompt=1", "max_stretch=0.5",
             "extra_groups=1", "loop.log_every=1"]  # fmt: skip
    arguments = ["train", "ppo", "--data", str(rows), "--base", str(tiny), "--reward", "judge", "--rollouts", "engine",
                 "--out", str(tmp_path / "ppo"), *(word for size in sizes for word in ("--set", size))]  # fmt: skip
    assert run(arguments) == 0
    assert [line["staleness"] for line in read_log(tmp_path / "ppo" / "run")] == [0, 0]
    assert run([*arguments[:-2], "--rollouts", "psychic"]) == 2
    hard = [*arguments, "--hardest-share", "0.5", "--out", str(tmp_path / "hard")]
    assert run(hard) == 0
    chosen = json.loads((tmp_path / "hard" / "run" / "prompts.json").read_text())
    assert len(chosen["ids"]) == 3
    assert run(hard) == 0
    assert run([*hard, "--hardest-share", "0.7"]) == 2
