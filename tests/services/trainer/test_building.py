"""Builds of data sets: they go on after a kill, keep recordings where asked, and let a cloning API speak."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from editx.cli.app import run
from services.trainer.data.manifest import Dataset, fetch
from services.trainer.data.rows import hash_audio
from services.trainer.data.specs import BUILDING, Built, build_spec
from shared.audio.io import Waveform, read_audio, write_audio
from shared.errors import TransientError, UserError
from shared.store.folder import FolderStore
from tests.services.trainer.test_data import RATE, Voice, tokenize, tone

TTS: dict[str, Any] = {"kind": "tts", "name": "set", "texts": "texts.jsonl", "speakers": {"en": ["ann"]}, "count": 6}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = [{"text": f"sentence number {k}", "language": "en"} for k in range(5)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    return tmp_path


class Counted(Voice):
    """A teacher that stops to answer after so many texts."""

    def __init__(self, patience: int = 1000) -> None:
        self.said, self.patience = 0, patience

    def say(self, *words: Any, **more: Any) -> Waveform:
        if self.said == self.patience:
            raise TransientError("the API sleeps")
        self.said += 1
        return super().say(*words, **more)


def build(folder: Path, teacher: Voice, **changes: Any) -> Built:
    return build_spec(TTS | changes, folder, lambda: tokenize, lambda: teacher, root=folder / "sets",
                      coded_by=lambda: "tokens")  # fmt: skip


def test_a_build_that_was_stopped_goes_on_with_what_it_had_made(folder: Path) -> None:
    whole = build(folder, Counted()).dataset.version
    (folder / "sets" / "set" / BUILDING / "rows.jsonl").unlink()
    with pytest.raises(TransientError, match="sleeps"):
        build(folder, Counted(patience=7), on_bad="skip")
    kept = folder / "sets" / "set" / BUILDING / "rows.jsonl"
    assert len(kept.read_text().splitlines()) == 3
    with kept.open("a") as file:
        file.write('{"cut short')
    again = Counted()
    built = build(folder, again)
    assert built.dataset.version == whole
    assert again.said == 6  # two texts for each of the three rows that were left
    saved = built.save(folder / "sets")
    assert Dataset.load(saved).version == whole
    assert [path.name for path in (folder / "sets" / "set").iterdir()] == [whole]


def test_another_description_or_material_starts_again(folder: Path) -> None:
    build(folder, Counted())
    for change in ({"seed": 1}, {}):
        if not change:
            (folder / "texts.jsonl").write_text((folder / "texts.jsonl").read_text().replace("number", "Number"))
        teacher = Counted()
        build(folder, teacher, **change)
        assert teacher.said == 12


@pytest.mark.parametrize(("changes", "message"), [
    ({"speakers": {"en": []}}, "names no speakers for en"),
    ({"texts": "one.jsonl"}, "a clone needs two"),
    ({"texts": "lost.jsonl"}, "cannot be read"),
    ({"keep_audio": True, "kind": "rows", "rows": "x.jsonl"}, "no keep_audio"),
])  # fmt: skip
def test_what_cannot_be_built_is_said(changes: dict[str, Any], message: str, folder: Path) -> None:
    (folder / "one.jsonl").write_text(json.dumps({"text": "alone", "language": "en"}) + "\n")
    with pytest.raises(UserError, match=message):
        build(folder, Voice(), **changes)


def test_recordings_are_kept_travel_and_are_those_that_were_hashed(folder: Path) -> None:
    built = build(folder, Voice(), keep_audio=True)
    saved = built.save(folder / "sets")
    found = Dataset.load(saved)
    for row in found.rows:
        for side in (row.source, row.target):
            heard = read_audio(found.recording(row, side))
            assert hash_audio(heard.samples, heard.sample_rate_hz) == side.sha256
    store = FolderStore(folder / "store")
    far = fetch(store, found.publish(store), folder / "far")
    assert far.recording(far.rows[0], far.rows[0].target).read_bytes() == found.recording(
        found.rows[0], found.rows[0].target
    ).read_bytes()  # fmt: skip
    rows = build_spec({"kind": "rows", "name": "copy", "rows": str(saved)}, folder, lambda: tokenize)
    copied = Dataset.load(rows.save(folder / "sets"))
    assert copied.recording(copied.rows[0], copied.rows[0].source).is_file()
    bare = build(folder, Voice(), name="bare").dataset
    with pytest.raises(UserError, match="has no recording of row"):
        bare.recording(bare.rows[0], bare.rows[0].source)


def test_recordings_become_prompts_that_nobody_has_answered(folder: Path) -> None:
    lines = [{"id": f"r{k}", "audio": f"r{k}.wav", "text": f"words {k}", "language": "en", "speaker": f"s{k}",
              "licence": "CC0-1.0", "origin": "tones"} for k in range(3)]  # fmt: skip
    for line in lines:
        write_audio(Waveform(tone(0.4), RATE), folder / line["audio"], "wav")
    (folder / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = {"kind": "prompts", "name": "prompts", "recordings": "r.jsonl", "keep_audio": True,
            "manners": ["emotion/sad", "style/whisper"]}  # fmt: skip
    built = build_spec(spec, folder, lambda: tokenize, root=folder / "sets")
    made = Dataset.load(built.save(folder / "sets"))
    assert [str(row.edit) for row in made.rows] == ["emotion sad", "style whisper", "emotion sad"]
    assert made.recording(made.rows[0], made.rows[0].source).is_file()
    assert Dataset.load(folder / "sets" / "prompts").version == made.version  # its only version
    for wrong, why in (({"manners": []}, "it needs some"), ({"manners": ["emotion/sat"]}, "'sat' is no known")):
        with pytest.raises(UserError, match=why):
            build_spec(spec | wrong, folder, lambda: tokenize)
    for change in ({"manners": ["emotion/happy"]}, {}):
        build_spec(spec | change, folder, lambda: tokenize, root=folder / "sets").save(folder / "sets")
    with pytest.raises(UserError, match="has 2 versions"):
        Dataset.load(folder / "sets" / "prompts")


@pytest.fixture
def cloning() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A cloning API of tones, its address and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(document | {"key": self.headers.get("Authorization")})
            hertz = 220.0 if document["instruction"] != "neutral" else 140.0
            body = write_audio(Waveform(tone(0.5, hertz), RATE), None, "wav") or b""
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not logged."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/clone", asked
    server.shutdown()
    server.server_close()
    thread.join(timeout=10)


def test_a_description_can_name_a_cloning_api_as_teacher(
    cloning: tuple[str, list[dict[str, Any]]], folder: Path, tiny: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    url, asked = cloning
    write_audio(Waveform(tone(0.6), RATE), folder / "ann.wav", "wav")
    (folder / "voices.jsonl").write_text(json.dumps({"speaker": "ann", "audio": "ann.wav"}) + "\n")
    (folder / "texts.jsonl").write_text(json.dumps({"text": "so it is", "language": "en", "manner": "emotion/sad"}))
    teacher = {"url": url, "licence": "CC-BY-4.0", "references": "voices.jsonl"}
    spec = {"kind": "triplets", "name": "cloned", "texts": "texts.jsonl", "speakers": {"en": ["ann"]}, "count": 1,
            "unfiltered": True, "teacher": teacher}  # fmt: skip
    monkeypatch.setenv("EDITX_TEACHER_KEY", "secret")

    def built(**changes: Any) -> int:
        (folder / "spec.yaml").write_text(yaml.safe_dump(spec | changes))
        return run(["data", "build", str(folder / "spec.yaml"), "--out", str(folder / "sets"), "--checkpoint",
                    str(tiny), "--json"])  # fmt: skip

    assert built() == 0
    (row,) = Dataset.load(Path(json.loads(capsys.readouterr().out)["folder"])).rows
    assert (row.origin, row.licence) == ("http-clone", "CC-BY-4.0")
    assert [(one["text"], one["instruction"], one["key"]) for one in asked] == [
        ("so it is", "neutral", "Bearer secret"), ("so it is", "sad", "Bearer secret"),
    ]  # fmt: skip
    assert not any(b"secret" in path.read_bytes() for path in (folder / "sets").rglob("*.json*"))
    for change, why in (({"teacher": teacher | {"references": "lost.jsonl"}}, "cannot be read"),
                        ({"teacher": {"url": "ftp://x", "licence": "x"}}, "teacher.url"),
                        ({"speakers": {"en": ["bob"]}}, "no reference recording of the speaker 'bob'")):  # fmt: skip
        assert built(**change) == 2
        assert why in json.loads(capsys.readouterr().out)["error"]["message"]


def test_a_cloning_teacher_hears_the_corpus_where_it_has_no_other_reference(
    cloning: tuple[str, list[dict[str, Any]]], folder: Path
) -> None:
    url, asked = cloning
    write_audio(Waveform(tone(0.7), RATE), folder / "a.wav", "wav")
    line = {"id": "a", "audio": "a.wav", "text": "well [Laughter] then", "language": "en", "speaker": "eve",
            "licence": "CC0-1.0", "origin": "corpus"}  # fmt: skip
    (folder / "recordings.jsonl").write_text(json.dumps(line) + "\n")
    spec = {"kind": "paralinguistic", "name": "sounds", "recordings": "recordings.jsonl",
            "teacher": {"url": url, "licence": "CC0-1.0"}}  # fmt: skip
    (row,) = build_spec(spec, folder, lambda: tokenize).dataset.rows
    assert (row.source.text, row.origin) == ("well then", "corpus+http-clone")
    assert asked[0]["text"] == "well then"
    assert asked[0]["reference"]
