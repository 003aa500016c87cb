"""The benchmark: its format, its iterations, resumption, judges, and intervals against known numbers."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from services.trainer.evaluate.acoustic import FEATURES, AcousticJudge, Classifier, change, features, pitch
from services.trainer.evaluate.benchmark import Case, read_cases
from services.trainer.evaluate.judges import without_ends
from services.trainer.evaluate.remote import Api, BudgetSpent, HttpJudge, Question, Verdict, parse_verdict
from services.trainer.evaluate.report import bootstrap, compare, markdown, paired, summarise, write_report
from services.trainer.evaluate.runner import OfflineJudge, Setup, read_results, run
from services.trainer.evaluate.system import SEED_STRIDE, PortSystem
from shared.audio.io import Waveform, write_audio
from shared.errors import PermanentError, UserError
from shared.schemas.edit import Edit
from tests.services.trainer.test_data import RATE, tone


def case(number: int = 0, **change) -> dict:
    return {"id": number % 2, "speaker": f"s{number % 4}", "gen_text": f"words {number}", "prompt_audio": "p.wav",
            "prompt_text": "a prompt", "lang": "en", "task": "emotion", "task_sub": "happy"} | change  # fmt: skip


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    write_audio(Waveform(tone(0.6, 140.0), RATE), tmp_path / "p.wav", "wav")
    lines = [case(k, task_sub=("happy", "sad")[k % 2]) for k in range(6)]
    (tmp_path / "emotion.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "emotion.jsonl"


class System:
    """Raises the pitch with every happy edit, lowers it with every sad one; counts its work."""

    def __init__(self) -> None:
        self.edits, self.pitches = [], {}

    def clone(self, reference, reference_text, text, seed):
        return Waveform(tone(0.6, 150.0), RATE)

    def edit(self, source, text, edit, seed):
        self.edits.append((text, str(edit), seed))
        f0 = pitch(source.samples)
        step = 1.25 if edit.detail == "happy" else 0.8
        return Waveform(tone(0.6, float(np.median(f0[f0 > 0])) * step), source.sample_rate_hz)


class PitchJudge:
    """Happy is above 165 Hz, sad below 130."""

    name = "pitch"

    def ask(self, question, wav, source_wav) -> Verdict:
        from shared.audio.io import read_audio

        f0 = pitch(read_audio(wav).samples)
        hertz = float(np.median(f0[f0 > 0]))
        return Verdict("happy" if hertz > 165 else "sad" if hertz < 130 else "none", 5.0)


def test_the_published_format_is_read_with_its_spelling_and_repeated_ids(tmp_path: Path, bench: Path) -> None:
    cases = read_cases(bench)
    assert len({c.key for c, _ in cases}) == 6
    sounds = Case.model_validate(case(task="paralingustic", gen_text="Well [Laughter] yes.", task_sub="Laughter"))
    assert sounds.words == "Well yes."
    assert sounds.edit.target_text == "Well [Laughter] yes."
    coy = Case.model_validate(case(task="style", task_sub="act_cute"))
    assert str(coy.edit) == "style act_coy"
    (tmp_path / "bad.jsonl").write_text(json.dumps(case()) + "\n" + json.dumps(case(task="dance")) + "\n")
    with pytest.raises(UserError, match=r"row 2: task"):
        read_cases(tmp_path / "bad.jsonl")
    (tmp_path / "lost.jsonl").write_text(json.dumps(case(prompt_audio="none.wav")) + "\n")
    with pytest.raises(UserError, match=r"row 1: there is no recording"):
        read_cases(tmp_path / "lost.jsonl")


def test_every_iteration_edits_the_one_before(bench: Path, tmp_path: Path) -> None:
    system = System()
    lines = run(read_cases(bench), system, PitchJudge(), tmp_path / "out", Setup(iterations=2))
    scores = np.array([[one["score"] for one in line["iterations"]] for line in lines])
    assert scores[:, 0].tolist() == [0] * 6
    assert scores[:, 1].tolist() == [1] * 6
    assert len(system.edits) == 12
    assert {seed for _, _, seed in system.edits} == {1, 2}
    assert (tmp_path / "out" / lines[0]["iterations"][2]["audio"]).exists()


def test_an_edit_is_judged_beside_the_clone_that_it_changes(bench: Path, tmp_path: Path) -> None:
    class Listener(PitchJudge):
        def ask(self, question, wav, source_wav) -> Verdict:
            heard.append((question.source_text, source_wav))
            return super().ask(question, wav, source_wav)

    heard: list[tuple[str, bytes]] = []
    (first, _), *_ = cases = read_cases(bench)[:1]
    lines = run(cases, System(), Listener(), tmp_path / "out", Setup(iterations=2))
    clone = (tmp_path / "out" / lines[0]["iterations"][0]["audio"]).read_bytes()
    assert [text for text, _ in heard] == [first.prompt_text, first.gen_text, first.gen_text]
    assert heard[0][1] != clone
    assert [wav for _, wav in heard[1:]] == [clone, clone]


def test_a_run_goes_on_where_it_stopped_and_tries_failures_again(bench: Path, tmp_path: Path) -> None:
    class Flaky(System):
        def clone(self, reference, reference_text, text, seed):
            if text == "words 3" and not getattr(self, "mended", False):
                raise PermanentError("the model broke")
            return super().clone(reference, reference_text, text, seed)

    system = Flaky()
    first = run(read_cases(bench), system, PitchJudge(), tmp_path / "out", Setup(iterations=1, workers=2))
    assert [line["error"] for line in first if "error" in line] == ["the model broke"]
    made = len(system.edits)
    system.mended = True
    second = run(read_cases(bench), system, PitchJudge(), tmp_path / "out", Setup(iterations=1))
    assert not any("error" in line for line in second)
    assert len(system.edits) == made + 1
    assert len(read_results(tmp_path / "out")) == 6


def test_the_bootstrap_of_known_values() -> None:
    interval = bootstrap([0.0, 1.0] * 200)
    assert interval.mean == 0.5
    assert interval.error == pytest.approx(0.5 / np.sqrt(400), rel=0.1)
    assert interval.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.01)
    assert bootstrap([3.0, 3.0]).low == bootstrap([3.0, 3.0]).high == 3.0
    with pytest.raises(UserError, match="nothing to report"):
        bootstrap([])


def test_silence_at_the_ends_is_no_part_of_how_long_something_was_said() -> None:
    said = tone(0.64, 140.0)
    ends, pause = np.zeros(8_000, np.float32), np.zeros(6_400, np.float32)
    with_pause = np.concatenate([ends, said, pause, said * 0.1, ends])
    assert len(without_ends(with_pause)) == pytest.approx(2 * len(said) + len(pause), abs=640)
    assert len(without_ends(np.zeros(100, np.float32))) == 100


def results(gain: int) -> list[dict]:
    def iteration(number: int, k: int) -> dict:
        return {"iteration": number, "score": float(k < 4 + gain * number), "duration_ratio": 1.0, "word_errors": 1.0,
                "words": 10.0, "similarity": 0.9, "naturalness": 4.0}  # fmt: skip

    return [{"key": f"k{k}", "task": "emotion", "lang": "en", "iterations": [iteration(0, k), iteration(1, k)]}
            for k in range(10)]  # fmt: skip


def test_tables_show_scores_words_voice_and_gains(tmp_path: Path) -> None:
    rows = summarise(results(2))
    assert [(row["iteration"], row["score"].mean) for row in rows] == [(0, 40.0), (1, 60.0)]
    assert rows[0]["wer"] == pytest.approx(10.0)
    table = markdown(rows, "sft")
    assert "| emotion | all | Iter1 | 10 | 60.0 [" in table
    gain = paired(results(1), results(3), "emotion", 1)
    assert gain.mean == pytest.approx(20.0)
    assert "| emotion | ppo | 40.0" in compare({"sft": results(1), "ppo": results(3)})
    assert write_report({"sft": results(1), "ppo": results(3)}, tmp_path).exists()
    assert (tmp_path / "emotion.png").exists()


def test_pitch_and_features_see_what_was_changed() -> None:
    low, high = tone(0.8, 120.0), 0.5 * tone(0.8, 240.0)
    f0 = pitch(low)
    assert np.median(f0[f0 > 0]) == pytest.approx(120, rel=0.03)
    moved = change(low, high)
    assert moved[FEATURES.index("f0")] == pytest.approx(1.0, abs=0.06)  # an octave
    assert moved[FEATURES.index("level")] == pytest.approx(-6.0, abs=0.5)  # dB
    assert moved[FEATURES.index("rate")] == 0.0
    texts = ("Twelve letters", "Eighteen letters, yes")
    assert change(low, tone(1.6, 120.0), ("abcdefgh", "abcdefgh"))[FEATURES.index("rate")] == pytest.approx(-1, abs=0.1)
    assert change(low, low, texts)[FEATURES.index("rate")] == pytest.approx(np.log2(18 / 13), abs=1e-6)
    assert features(low, "[Sigh] 你好 no")[-1] == pytest.approx(np.log2(8 / 0.8), abs=0.1)
    with pytest.raises(UserError, match="silent"):
        features(np.zeros(1000, np.float32))


def test_the_acoustic_judge_tells_high_from_low_voices(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, labels = [], []
    for label, factor in (("happy", 1.3), ("sad", 0.8), ("neutral", 1.0)):
        for _ in range(12):
            base = float(rng.uniform(110, 180))
            x.append(change(tone(0.4, base), tone(0.4, base * factor * float(rng.uniform(0.97, 1.03)))))
            labels.append(label)
    judge = AcousticJudge({"emotion": Classifier.fit(x, labels)})
    judge.save(tmp_path / "judge.json")
    judge = AcousticJudge.load(tmp_path / "judge.json")
    assert judge.label("emotion", tone(0.4, 140), tone(0.4, 180)) == "happy"
    assert judge.score("emotion", "sad", tone(0.4, 140), tone(0.4, 112)) > 0.6
    assert judge.score("emotion", "unknown", tone(0.4, 140), tone(0.4, 112)) == 0
    wavs = [write_audio(Waveform(tone(0.4, hertz), RATE), None, "wav") for hertz in (140, 140)]
    assert OfflineJudge(judge).ask(Question("emotion", "happy", "words", ("happy", "sad")), *wavs).label == "none"
    with pytest.raises(UserError, match="knows no task"):
        judge.label("style", tone(0.4), tone(0.4))


def answer(kind: str, text: str) -> bytes:
    if kind == "gemini":
        return json.dumps({"candidates": [{"content": {"parts": [{"text": text}]}}]}).encode()
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@pytest.mark.parametrize("kind", ["gemini", "openai"])
def test_a_remote_judge_asks_once_retries_and_keeps_to_its_budget(kind: str, tmp_path: Path) -> None:
    sent, slept = [], []
    replies = [(503, b"")] + [
        (200, answer(kind, '```json\n{"label": "Happy", "rating": 8, "naturalness": 7}\n```'))
    ] * 3

    def post(url, document, headers, timeout):
        sent.append((url, document, headers))
        return replies[min(len(sent) - 1, 3)]

    api = Api(kind, "judge-1", "secret", "http://judge/v1", cost_per_call=1.0, budget=3.0, calls_per_minute=6000)
    judge = HttpJudge(api, tmp_path, post=post, sleep=slept.append)
    question = Question("emotion", "happy", "words", ("happy", "sad"))
    verdict = judge.ask(question, b"wav", b"source")
    assert verdict == Verdict("happy", 8.0, 7.0)
    assert verdict.is_right("happy")
    assert len(sent) == 2
    assert "happy, sad, none" in json.dumps(sent[0][1])
    heard = [json.dumps(sent[0][1]).index(base64.b64encode(wav).decode()) for wav in (b"source", b"wav")]
    assert heard == sorted(heard)  # before, then after
    assert judge.ask(question, b"wav", b"source") == verdict
    assert len(sent) == 2  # the second answer came from the cache
    judge.ask(question, b"wav", b"another source")
    with pytest.raises(BudgetSpent, match="budget of 3 is spent"):
        judge.ask(question, b"third", b"source")


@pytest.mark.parametrize(("entries", "message"), [
    ({"kind": "psychic"}, "no judge API of kind 'psychic'"),
    ({"budget": 5.0}, "needs the cost of a call"),
    ({"calls_per_minute": 0.0}, "rate must be positive"),
])  # fmt: skip
def test_a_judge_that_cannot_be_asked_so_is_refused(entries: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Api(**{"kind": "gemini", "model": "m", "key": "k", "url": "http://x"} | entries)


def test_a_spent_budget_stops_the_benchmark_which_goes_on_later(bench: Path, tmp_path: Path) -> None:
    class Dear(PitchJudge):
        left = 5

        def ask(self, question, wav, source_wav) -> Verdict:
            if not self.left:
                raise BudgetSpent("nothing is left")
            self.left -= 1
            return super().ask(question, wav, source_wav)

    system = System()
    with pytest.raises(BudgetSpent):
        run(read_cases(bench), system, Dear(), tmp_path / "out", Setup(iterations=1))
    assert len(read_results(tmp_path / "out")) == 2
    assert len(system.edits) < 6
    assert len(run(read_cases(bench), system, PitchJudge(), tmp_path / "out", Setup(iterations=1))) == 6


def test_answers_of_judges_are_read_in_every_form_or_refused() -> None:
    assert parse_verdict("3", ()).rating == 3
    assert parse_verdict('{"score": 2}', ()).rating == 2
    assert parse_verdict('{"label": "joyful", "rating": 4}', ("happy",)).label == "none"
    with pytest.raises(PermanentError, match="cannot be read"):
        parse_verdict("I think it is happy.", ("happy",))


def test_of_several_answers_the_one_of_the_highest_reward_is_decoded() -> None:
    class Models:
        """Answers as long as their seed says; longer ones have a higher reward."""

        def __init__(self) -> None:
            self.decoded: list[int] = []

        def infer(self, model, inputs, parameters=None):
            if model == "tokenizer":
                return {
                    "linguistic": np.zeros(4, np.int32),
                    "semantic": np.zeros(6, np.int32),
                    "speaker_embedding": np.zeros(192, np.float32),
                    "prompt_mel": np.zeros((24, 80), np.float32),
                }
            if model == "llm":
                return {"mixed": np.zeros(5 * (parameters["seed"] % SEED_STRIDE + parameters["seed"] // SEED_STRIDE))}
            if model == "reward":
                return {"score": np.array(len(inputs["mixed"]))}
            self.decoded.append(len(inputs["mixed"]))
            return {"audio": np.zeros(10, np.float32)}

    class Tokens:
        def encode_chat(self, turns):
            return [1, 2]

    models, source = Models(), Waveform(np.zeros(16_000, np.float32), 16_000)
    for n_best in (1, 4):
        PortSystem(models, Tokens(), n_best=n_best).edit(source, "so", Edit(type="emotion", detail="happy"), 1)
    PortSystem(models, Tokens(), n_best=4).clone(source, "so", "well", 7)
    assert models.decoded == [5, 20, 35]
