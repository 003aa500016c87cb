"""Data: bad rows are named, versions follow content, leaks fail, margins hold at their edges, pairs are clear."""

import json
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import soundfile

from services.trainer.data import build, degrade
from services.trainer.data.checks import HeldOut, Leak, check_leaks, normal, read_held_out, statistics
from services.trainer.data.manifest import Dataset, Refused, collect, fetch, read_rows
from services.trainer.data.margin import Annotation, MarginScorer, Thresholds, keep_large_margins, read_annotations
from services.trainer.data.preferences import (
    MARGINS,
    Candidate,
    Rating,
    Weights,
    composite,
    make_pairs,
    read_ratings,
    scale_of,
    scores_of,
)
from services.trainer.data.rating import RatingServer, read_items, shuffled
from services.trainer.data.rows import Row, Side, as_pcm, hash_audio
from services.trainer.data.teachers import CloneApi, HttpTeacher, with_retries
from shared.audio.io import Waveform, read_audio, write_audio
from shared.errors import PermanentError, TransientError, UserError
from shared.store.folder import FolderStore
from tests.services.trainer.conftest import make_row, random_codes

ROWS = [make_row(i, margin=float(i)) for i in range(4, 10)]
RATE = 16_000


def tone(seconds: float, hertz: float = 150.0) -> np.ndarray:
    t = np.arange(int(seconds * RATE)) / RATE
    wave = sum(np.sin(2 * np.pi * hertz * k * t) / k for k in range(1, 8))
    return (0.2 * wave * (1 + 0.5 * np.sin(2 * np.pi * 3 * t))).astype(np.float32)


def test_a_row_survives_json_and_keeps_its_codes() -> None:
    again = Row.model_validate_json(ROWS[0].model_dump_json())
    assert again.target.mixed.tolist() == ROWS[0].target.mixed.tolist()
    assert again.content_key() == ROWS[0].content_key()
    as_list = json.loads(ROWS[0].model_dump_json())
    as_list["target"]["mixed"] = ROWS[0].target.mixed.tolist()
    assert Row.model_validate(as_list).target.sha256 == ROWS[0].target.sha256


@pytest.mark.parametrize(("change", "message"), [
    ({"target": {"text": "x", "mixed": [5000] * 5}}, "target.mixed"),
    ({"target": {"text": "x", "mixed": []}}, "no audio tokens"),
    ({"target": {"text": "  ", "mixed": [0, 0, 1024, 1024, 1024]}}, "the text is blank"),
    ({"edit": {"type": "emotion", "detail": "hapy"}}, "'hapy' is no known emotion tag"),
    ({"margin": float("nan")}, "the margin is no number"),
    ({"licence": ""}, "licence"),
])  # fmt: skip
def test_a_bad_row_is_named_with_its_reason(change: dict, message: str, tmp_path: Path) -> None:
    bad = json.loads(make_row(1).model_dump_json()) | change
    path = tmp_path / "rows.jsonl"
    path.write_text(make_row(0).model_dump_json() + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(UserError, match=r"Row 2 \(row-1\)") as error:
        read_rows(path, name="set")
    assert message in error.value.message
    skipped = read_rows(path, name="set", on_bad="skip")
    assert len(skipped.rows) == 1
    assert message in skipped.refused[0].reason


def test_repeats_are_dropped_and_a_taken_id_is_a_mistake() -> None:
    repeat = make_row(1).model_copy(update={"id": "other"})
    found = collect("set", [make_row(1), repeat])
    assert [row.id for row in found.rows] == ["row-1"]
    assert found.refused == (Refused(2, "other", "says the same as row-1"),)
    taken = make_row(2).model_copy(update={"id": "row-1"})
    with pytest.raises(UserError, match="its id is taken"):
        collect("set", [make_row(1), taken])


def test_a_version_follows_the_content_alone(tmp_path: Path) -> None:
    first, again = collect("set", ROWS), collect("set", list(ROWS), made_by={"when": "later"})
    assert first.version == again.version
    assert collect("set", ROWS[1:]).version != first.version
    folder = first.save(tmp_path)
    assert folder == tmp_path / "set" / first.version
    loaded = Dataset.load(folder)
    assert loaded.content_hash == first.content_hash
    assert loaded.manifest()["licences"] == {"CC0-1.0": 6}


def test_a_changed_set_is_noticed(tmp_path: Path) -> None:
    folder = collect("set", ROWS).save(tmp_path)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="not those of the manifest"):
        Dataset.load(folder)


def test_a_set_travels_through_the_object_store(tmp_path: Path) -> None:
    dataset = collect("set", ROWS)
    store = FolderStore(tmp_path / "store")
    prefix = dataset.publish(store)
    assert fetch(store, prefix, tmp_path).version == dataset.version
    store.put(f"{prefix}/rows.jsonl", store.get(f"{prefix}/rows.jsonl") + b"\n")
    with pytest.raises(UserError, match=r"rows\.jsonl is not the file that was published"):
        fetch(store, prefix, tmp_path)


def test_leaks_by_speaker_text_and_audio_fail() -> None:
    held_out = HeldOut.of("bench", [make_row(0)])
    with pytest.raises(Leak, match=r"row-3: speaker speaker-0 is in bench"):
        check_leaks([make_row(3)], [held_out])
    with pytest.raises(Leak, match="its text is in bench"):
        check_leaks([make_row(1)], [held_out])
    other = {"speaker": "x", "source": make_row(1).source.model_copy(update={"text": "elsewhere"})}
    same_audio = make_row(0).model_copy(update=other | {"target": make_row(0).target.model_copy(update={"text": "so"})})
    with pytest.raises(Leak, match="its audio is in bench"):
        check_leaks([same_audio], [held_out])
    check_leaks([make_row(0)], [HeldOut("none", frozenset(), frozenset(), frozenset())])
    assert normal("Oh, [Laughter] no!") == "ohno"


def test_a_benchmarks_recordings_texts_and_speakers_leak_too(tmp_path: Path) -> None:
    write_audio(Waveform(tone(1.0), RATE), tmp_path / "p.wav", "wav")
    case = {"id": 1, "speaker": "eve", "gen_text": "To be said", "prompt_audio": "p.wav", "prompt_text": "A prompt.",
            "lang": "en", "task": "emotion", "task_sub": "happy"}  # fmt: skip
    bench = tmp_path / "bench.jsonl"
    bench.write_text(json.dumps(case) + "\n")
    asked: list[str] = []

    def held_out(rows: list[Row]) -> list[HeldOut]:
        return [read_held_out(bench, rows, lambda: asked.append("tokenizer") or tokenize)]

    with pytest.raises(Leak, match="speaker eve is in"):
        check_leaks([make_row(0).model_copy(update={"speaker": "eve"})], held_out([make_row(0)]))
    other = make_row(1).model_copy(update={"target": make_row(1).target.model_copy(update={"text": "a  PROMPT"})})
    with pytest.raises(Leak, match="its text is in"):
        check_leaks([other], held_out([other]))
    waveform = read_audio(tmp_path / "p.wav")
    tokens_alone = make_row(2).model_copy(update={"source": Side(text="so", mixed=tokenize(waveform))})
    with pytest.raises(Leak, match="its audio is in"):
        check_leaks([tokens_alone], held_out([tokens_alone]))
    assert asked
    asked.clear()
    soundfile.write(tmp_path / "p.flac", as_pcm(waveform.samples), RATE)
    copied = recording("other words", read_audio(tmp_path / "p.flac").samples)
    (denoised,) = build.simple_edits([copied], tokenize, kinds=("denoise",))
    with pytest.raises(Leak, match="its audio is in"):
        check_leaks([denoised], held_out([denoised]))
    assert not asked
    check_leaks([make_row(0)], held_out([make_row(0)]))


def test_statistics_count_hours_and_margins() -> None:
    found = statistics(collect("set", ROWS))
    assert found["rows"] == 6
    assert found["target_hours"] == pytest.approx(6 * 3 * 0.12 / 3600)
    assert found["margins"]["emotion happy"] == {"rows": 6, "mean": 6.5, "lowest": 4.0, "highest": 9.0}


def test_margins_are_kept_at_their_threshold_and_dropped_below() -> None:
    kept = keep_large_margins(ROWS, Thresholds(6.0))
    assert [row.margin for row in kept.rows] == [6.0, 7.0, 8.0, 9.0]
    assert len(kept.before["emotion happy"]) == 6
    stricter = keep_large_margins(ROWS, Thresholds(6.0, {"emotion happy": 8.5}))
    assert [row.margin for row in stricter.rows] == [9.0]
    with pytest.raises(UserError, match="none may be under 6"):
        Thresholds(5.9)
    with pytest.raises(UserError, match="row-0 has no margin"):
        keep_large_margins([make_row(0)], Thresholds())


def test_the_margin_scorer_learns_the_size_of_a_change(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 3))
    ratings = np.clip(1 + 3 * np.abs(x[:, 0]), 1, 10)
    scorer = MarginScorer.fit(x, ["emotion happy"] * 40 + ["emotion sad"] * 40, ratings)
    assert scorer.score([3.0, 0, 0], "emotion happy") > scorer.score([0.1, 0, 0], "emotion happy") + 3
    assert 1 <= scorer.score([100.0, 0, 0], "unseen category") <= 10
    scorer.save(tmp_path / "margin.json")
    loaded = MarginScorer.load(tmp_path / "margin.json")
    assert loaded.score(x[0], "emotion sad") == pytest.approx(scorer.score(x[0], "emotion sad"))


def test_annotations_come_from_csv_and_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,category,rating,source,audio\np1,emotion sad,7,n.wav,s.wav\n")
    line = {"id": "p1", "category": "emotion sad", "rating": 7, "source": "n.wav", "audio": "s.wav"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    expected = [Annotation(**line)]
    assert read_annotations(tmp_path / "a.csv") == read_annotations(tmp_path / "a.jsonl") == expected
    for number, (change, why) in enumerate(
        [
            ({"rating": 11}, "rating"),
            ({"category": "emotion sat"}, "'sat' is no known"),
            ({"audio": None}, "audio: Input"),
            ({"id": "p1"}, "taken by another pair"),
        ]
    ):
        bad = tmp_path / f"{number}.jsonl"
        bad.write_text(json.dumps(line) + "\n\n" + json.dumps(line | {"id": "p2"} | change) + "\n")
        with pytest.raises(UserError, match=rf"row 3: .*{why}"):
            read_annotations(bad)


def test_a_bigger_change_alone_never_wins() -> None:
    wrong_but_large = Rating(candidate="a", rater="r", scale=10, correctness=2, prosody=5, naturalness=5, margin=10)
    right = Rating(candidate="b", rater="r", correctness=4, prosody=4, naturalness=4, margin=4)
    assert composite(wrong_but_large, Weights(margin=5.0)) == 3.0  # correctness + lead
    assert composite(right, Weights()) == pytest.approx(4.0)
    assert composite(Rating(candidate="c", rater="r", correctness=3), Weights()) == 3
    mumbled = Rating(candidate="d", rater="r", scale=10, correctness=9, naturalness=9, words=2)
    assert composite(mumbled, Weights()) == 3.0  # words + lead


def test_pairs_need_more_than_the_margin() -> None:
    prompt = make_row(0)
    candidates = [Candidate(id=f"c{k}", prompt="row-0", mixed=random_codes(2, k)) for k in range(4)]
    exact = make_pairs({"row-0": prompt}, candidates[:2], {"c0": 1.0, "c1": 4.0}, margin=3.0, rated_by="people")
    assert exact == []
    pairs = make_pairs({"row-0": prompt}, candidates, {"c0": 1.0, "c1": 4.5, "c2": 2.0, "c3": 5.0}, margin=3.0,
                       rated_by="people")  # fmt: skip
    assert [(p.id, p.margin) for p in pairs] == [("c3--c0", 4.0)]
    assert pairs[0].target.mixed.tolist() == candidates[3].mixed.tolist()
    assert pairs[0].rejected.mixed.tolist() == candidates[0].mixed.tolist()
    assert pairs[0].rated_by == "people"
    with pytest.raises(UserError, match="unknown prompt"):
        make_pairs({}, candidates, {"c0": 1.0}, margin=3.0, rated_by="people")


def test_ratings_come_from_csv_and_jsonl(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("candidate,rater,correctness,prosody,naturalness\nc1,ann,5,4,\n")
    (tmp_path / "r.jsonl").write_text('{"candidate": "c1", "rater": "bob", "correctness": 3, "prosody": 4}\n')
    ratings = read_ratings(tmp_path / "r.csv") + read_ratings(tmp_path / "r.jsonl")
    assert scores_of(ratings, Weights(1, 0, 0, 0)) == {"c1": 4.0}
    for value, scale in ((11, 10), (8, 5)):
        line = {"candidate": "c1", "rater": "bob", "correctness": value, "scale": scale}
        (tmp_path / "bad.jsonl").write_text(json.dumps(line) + "\n")
        with pytest.raises(UserError, match=r"row 1: .*correctness"):
            read_ratings(tmp_path / "bad.jsonl")


def test_ratings_of_people_and_of_judges_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "people.csv").write_text("candidate,rater,correctness\nc1,ann,4\nc2,ann,1\n")
    (tmp_path / "judge.csv").write_text("candidate,rater,scale,correctness\nc1,gemini,10,9\nc2,gemini,10,1\n")
    people, judges = (read_ratings(tmp_path / name) for name in ("people.csv", "judge.csv"))
    assert scores_of(people, Weights()) == {"c1": 4.0, "c2": 1.0}
    assert scores_of(judges, Weights()) == {"c1": 9.0, "c2": 1.0}
    assert [MARGINS[scale_of(ratings)] for ratings in (people, judges)] == [3.0, 8.0]
    with pytest.raises(UserError, match="cannot be compared"):
        scores_of([*people, *judges], Weights())


def test_the_rating_page_is_blind_shuffled_and_takes_ratings(tmp_path: Path) -> None:
    wav = write_audio(Waveform(tone(0.2), RATE), None, "wav")
    (tmp_path / "a.wav").write_bytes(wav)
    (tmp_path / "items.jsonl").write_text("".join(
        json.dumps({"candidate": f"model-{k}", "instruction": "Make it <sad>.", "text": "words", "source": "a.wav",
                    "audio": "a.wav"}) + "\n" for k in range(8)))  # fmt: skip
    items = read_items(tmp_path / "items.jsonl")
    assert shuffled(items, "ann") == shuffled(items, "ann") != shuffled(items, "bob")
    server = RatingServer(items, "ann", tmp_path / "ratings.jsonl")
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        page = urllib.request.urlopen(server.url).read().decode()
        assert "Make it &lt;sad&gt;." in page
        assert "model-" not in page
        place, item = server.next_item()
        assert urllib.request.urlopen(f"{server.url}audio/{place}/audio").read() == wav
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(f"{server.url}rate/{place}", b"correctness=9&prosody=4&naturalness=3")
        urllib.request.urlopen(f"{server.url}rate/{place}", b"correctness=5&prosody=4&naturalness=3")
    finally:
        server.close()
    rating = read_ratings(tmp_path / "ratings.jsonl")[0]
    assert (rating.candidate, rating.rater, rating.correctness) == (item.candidate, "ann", 5)
    assert RatingServer(items, "ann", tmp_path / "ratings.jsonl").next_item()[1] != item


class Voice:
    """A teacher of tones: the manner sets the pitch."""

    name, licence = "tones", "CC0-1.0"

    def say(self, text, language, speaker, manner, *, reference=None):
        if "unsayable" in text:
            raise UserError("it cannot be said")
        return Waveform(tone(0.3 + 0.01 * len(text), 220.0 if manner != "neutral" else 140.0), RATE)


def tokenize(waveform: Waveform) -> np.ndarray:
    return random_codes(max(1, int(waveform.duration_s / 0.12)), int(np.abs(waveform.samples).sum() * 1000) % 2**31)


SENTENCES = [build.Sentence(f"a happy sentence number {k}", "en", "emotion/happy") for k in range(5)]


def test_triplets_share_text_and_speaker_and_carry_their_margin() -> None:
    rows = list(build.triplets(Voice(), SENTENCES, {"en": ["ann", "bob"]}, tokenize, lambda a, b, c: 7.0, count=40))
    assert all(isinstance(row, Row) and row.source.text == row.target.text and row.margin == 7.0 for row in rows)
    assert {str(row.edit) for row in rows} == {"emotion happy", "emotion remove"}


def test_clones_say_another_text_than_their_reference_and_bad_ones_are_reported() -> None:
    sentences = [*SENTENCES[:2], build.Sentence("an unsayable one", "en")]
    rows = list(build.zero_shot(Voice(), sentences, {"en": ["ann"]}, tokenize, count=10))
    good = [row for row in rows if isinstance(row, Row)]
    assert good
    assert all(row.edit.target_text == row.target.text != row.source.text for row in good)
    assert {row.reason for row in rows if isinstance(row, Refused)} == {"it cannot be said"}


def recording(text: str, audio: np.ndarray) -> build.Recording:
    return build.Recording("r1", text, "en", "ann", Waveform(audio, RATE), "CC0-1.0", "nv")


def test_quadruplets_take_the_tags_out_of_the_source_only() -> None:
    row = next(build.paralinguistic([recording("Well [Laughter] yes.", tone(1.0))], Voice(), tokenize))
    assert isinstance(row, Row)
    assert (row.source.text, row.edit.target_text) == ("Well yes.", "Well [Laughter] yes.")
    plain = next(build.paralinguistic([recording("No tags.", tone(1.0))], Voice(), tokenize))
    assert isinstance(plain, Refused)
    assert "no [tag]" in plain.reason


def test_simple_edits_start_from_the_degraded_side() -> None:
    audio = tone(1.0)
    speed, denoise, vad = build.simple_edits([recording("words", audio)], tokenize)
    assert speed.source.sha256 == hash_audio(audio, RATE) != speed.target.sha256
    assert denoise.target.sha256 == hash_audio(audio, RATE) != denoise.source.sha256
    assert vad.source.seconds > vad.target.seconds
    broken = next(build.simple_edits([recording("words", np.full(RATE, np.nan, np.float32))], tokenize))
    assert isinstance(broken, Refused)


def test_tempo_changes_the_length_and_not_the_pitch() -> None:
    from services.trainer.evaluate.acoustic import pitch

    audio = tone(1.0)
    for factor in (0.65, 1.5):
        changed = degrade.change_tempo(audio, RATE, factor)
        assert len(changed) == pytest.approx(len(audio) / factor, rel=0.01)
        f0 = pitch(changed)
        assert np.median(f0[f0 > 0]) == pytest.approx(150, rel=0.04)


def test_noise_has_the_level_that_was_asked_for() -> None:
    audio = tone(1.0)
    noisy = degrade.add_noise(audio, 10.0, np.random.default_rng(0))
    ratio = 10 * np.log10(np.mean(audio**2) / np.mean((noisy - audio) ** 2))
    assert ratio == pytest.approx(10, abs=0.1)


def test_silence_is_cut_out_and_speech_kept() -> None:
    audio = np.concatenate([np.zeros(RATE, np.float32), tone(1.0), np.zeros(RATE, np.float32)])
    assert len(degrade.remove_silence(audio, RATE)) == pytest.approx(RATE, abs=0.05 * RATE)


def test_the_clone_api_is_tried_again_and_told_apart_from_a_refusal() -> None:
    answers = [(503, b""), (200, write_audio(Waveform(tone(0.3), RATE), None, "wav"))]
    sent, slept = [], []

    def post(url, document, headers, timeout):
        sent.append((document, headers))
        return answers.pop(0)

    references = {"ann": {"neutral": Waveform(tone(0.5), RATE)}}
    teacher = HttpTeacher(CloneApi("http://x", "key"), references, "proprietary", post=post, sleep=slept.append)
    assert teacher.say("hello", "en", "ann", "emotion/sad").duration_s == pytest.approx(0.3, abs=0.01)
    assert sent[0][0]["instruction"] == "sad"
    assert sent[0][1] == {"Authorization": "Bearer key"}
    assert slept == [1.0]
    with pytest.raises(UserError, match="no reference recording"):
        teacher.say("hello", "en", "nobody", "neutral")
    with pytest.raises(PermanentError, match="status 401"):
        with_retries(lambda: (401, b"no"), where="http://x")
    with pytest.raises(TransientError, match="failed 3 times"):
        with_retries(lambda: (429, b""), where="http://x", sleep=slept.append, retries=2)
