"""A corpus in NVSpeech's layout becomes recordings, and from them paralinguistic quadruplets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from editx.cli.app import run
from services.trainer.data.manifest import Dataset
from services.trainer.data.nvspeech import import_recordings, tagged
from services.trainer.data.specs import build_spec
from shared.audio.io import Waveform, write_audio
from shared.errors import UserError
from tests.services.trainer.test_data import RATE, Voice, tokenize, tone


def corpus(folder: Path, names: list[str]) -> Path:
    for name in names:
        path = folder / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_audio(Waveform(tone(0.8), RATE), path, "wav")
    return folder


def test_an_index_becomes_recordings_and_quadruplets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = corpus(tmp_path / "nv", ["wavs/a", "wavs/b", "wavs/c"])
    lines = [{"file_name": "wavs/a.wav", "text": "你真有意思[Laughter]", "speaker": "s1"},
             {"file_name": "wavs/b.wav", "text": "I don't know (Uhm) maybe (really) <Sigh> later."},
             {"file_name": "wavs/c.wav", "text": "[Crying] no"},
             {"file_name": "wavs/c.wav", "text": "nothing marked"},
             {"file_name": "wavs/lost.wav", "text": "[Cough] excuse me"}, {"file_name": "wavs/c.wav"}]  # fmt: skip
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "recordings.jsonl"
    assert run(["data", "import-sounds", str(folder), "--out", str(out), "--licence", "CC-BY-NC-SA-4.0", "--origin",
                "NVSpeech"]) == 0  # fmt: skip
    said = capsys.readouterr().err
    assert "2 recordings, 4 left out" in " ".join(said.split())
    for why in ("'Crying' is no known", "marks no sound", "no recording wavs/lost.wav", "text: Field required"):
        assert why in " ".join(said.split())
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(one["id"], one["text"], one["speaker"]) for one in made] == [
        ("wavs-a", "你真有意思[Laughter]", "s1"),
        ("wavs-b", "I don't know [Uhm] maybe (really) [Sigh] later.", "wavs-b"),
    ]
    spec = {"kind": "paralinguistic", "name": "nv", "recordings": "recordings.jsonl"}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    built = build_spec(spec, tmp_path, lambda: tokenize, Voice)
    rows = Dataset.load(built.save(tmp_path / "sets")).rows
    assert [(row.source.text, row.edit.target_text) for row in rows][1] == (
        "I don't know maybe (really) later.", "I don't know [Uhm] maybe (really) [Sigh] later.",
    )  # fmt: skip
    assert {row.licence for row in rows} == {"CC-BY-NC-SA-4.0"}
    assert {row.origin for row in rows} == {"NVSpeech+tones"}


def test_json_files_beside_the_recordings_are_read(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "emilia", ["ZH_1", "deep/ZH_2"])
    (folder / "ZH_1.json").write_text(
        json.dumps({"id": 7, "text": "哦[Surprise-oh]", "language": "zh", "wav": "x/ZH_1.wav"})
    )
    (folder / "deep" / "ZH_2.json").write_text(json.dumps({"text": "（Breathing）好", "speaker": "s2"}))
    (folder / "deep" / "ZH_3.json").write_text("{")
    out = tmp_path / "made" / "r.jsonl"
    count, refused = import_recordings(folder, out, licence="x", language="zh", origin="Emilia-NV")
    assert count == 2
    assert [one.id for one in refused] == ["deep/ZH_3.json"]
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(one["id"], one["speaker"], one["text"]) for one in made] == [
        ("7", "7", "哦[Surprise-oh]"), ("deep-ZH_2", "s2", "[Breathing]好"),
    ]  # fmt: skip
    assert all((out.parent / one["audio"]).is_file() for one in made)


def test_what_is_no_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no corpus"):
        import_recordings(tmp_path, tmp_path / "r.jsonl", licence="x", language="zh", origin="x")
    with pytest.raises(UserError, match="no known paralinguistic tag"):
        tagged("[Shh] quiet")
