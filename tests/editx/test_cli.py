"""The command line, with a tiny checkpoint of random weights: files, reports, exit codes, and what is left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from editx.cli.app import run
from shared.audio.io import Waveform, read_audio, write_audio

ROOT = Path(__file__).resolve().parents[2]
SPEECH = ROOT / "tests" / "data" / "audio" / "en_happy_prompt.wav"
TEXT = "You know, I just finished."
FAST = ["--steps", "2", "--seed", "3"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A second of speech with its transcript beside it."""
    speech = read_audio(SPEECH)
    path = tmp_path / "in.wav"
    write_audio(Waveform(speech.samples[: speech.sample_rate_hz], speech.sample_rate_hz), path)
    path.with_suffix(".txt").write_text(TEXT, encoding="utf-8")
    return path


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


def command(*arguments: str | Path, **settings: Any) -> subprocess.Popen[bytes]:
    """The command line as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "editx", *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_hear_interrupts, **settings,
    )  # fmt: skip


def _hear_interrupts() -> None:
    """A shell's background jobs, and what they start, ignore interrupts: a test run there must not pass that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_edit_writes_its_result_and_says_what_it_did(source: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.wav"
    process = command("edit", source, "--emotion", "happy", "-o", out, "--checkpoint", tiny, *FAST)
    stdout, stderr = process.communicate(timeout=120)
    told = stderr.decode()
    assert process.returncode == 0, told
    assert stdout == b""
    assert f"emotion happy: in.wav (1.00 s) -> {out}" in told
    assert "RTF" in told
    assert "seed 3" in told
    assert read_audio(out).sample_rate_hz == 24_000


def test_the_report_for_machines_tells_files_times_and_seed_and_a_seed_repeats_the_result(
    source: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "out.flac", tmp_path / "out.png"
    arguments = ["edit", str(source), "--style", "whisper", "--iterations", "2", "--checkpoint", str(tiny), *FAST]
    assert run([*arguments, "-o", str(out), "--picture", str(picture), "--json"]) == 0
    told = report(capsys)
    assert told["edit"] == {"type": "style", "detail": "whisper"}
    assert told["iterations"] == [str(tmp_path / "out.iter1.flac"), str(tmp_path / "out.iter2.flac")]
    assert [step["kind"] for step in told["steps"]] == ["tokenize", "generate", "decode"] * 2
    assert told["seed"] == 3
    assert told["rtf"] > 0
    first, last = read_audio(tmp_path / "out.iter1.flac"), read_audio(out)
    np.testing.assert_array_equal(last.samples, read_audio(tmp_path / "out.iter2.flac").samples)
    assert first.duration_s > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again.flac"
    assert run([*arguments, "-o", str(again), "--json"]) == 0
    np.testing.assert_array_equal(read_audio(again).samples, last.samples)


@pytest.mark.parametrize("suffix", ["wav", "mp3", "opus"])
def test_the_suffix_decides_the_format(source: Path, tiny: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out.{suffix}"
    assert run(["edit", str(source), "--denoise", "-o", str(out), "--checkpoint", str(tiny), *FAST]) == 0
    assert soundfile.info(out).format == {"wav": "WAV", "mp3": "MP3", "opus": "OGG"}[suffix]


@pytest.mark.parametrize(
    ("form", "subtype", "rate", "channels"), [("FLAC", "PCM_16", 44_100, 2), ("OGG", "OPUS", 48_000, 1)]
)
def test_any_format_rate_and_channel_count_is_read(
    tiny: Path, tmp_path: Path, form: str, subtype: str, rate: int, channels: int
) -> None:
    path, out = tmp_path / "in.bin", tmp_path / "out.wav"
    sound = 0.2 * np.sin(np.arange(rate)[:, None] / np.arange(9, 9 + channels)[None])
    soundfile.write(path, sound, rate, format=form, subtype=subtype)
    assert run(["edit", str(path), "--vad", "-o", str(out), "--checkpoint", str(tiny), *FAST]) == 0
    assert out.exists()


def test_a_folder_is_edited_as_a_batch_and_a_bad_file_stops_nothing(
    source: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "many", tmp_path / "results"
    folder.mkdir()
    for name in ("a", "b"):
        shutil.copy(source, folder / f"{name}.wav")
        shutil.copy(source.with_suffix(".txt"), folder / f"{name}.txt")
    (folder / "broken.wav").write_bytes(b"no sound in here")
    arguments = ["edit", str(folder), "--emotion", "sad", "-o", str(out), "--checkpoint", str(tiny), *FAST]
    assert run([*arguments, "--json"]) == 5
    told = report(capsys)
    assert sorted(done["input"] for done in told["done"]) == ["a.wav", "b.wav"]
    assert [failed["error"]["code"] for failed in told["failed"]] == ["audio_not_readable"]
    assert sorted(path.name for path in out.iterdir()) == ["a.wav", "b.wav"]
    (folder / "broken.wav").unlink()
    assert run(arguments) == 0
    assert "2 of 2 recordings edited" in capsys.readouterr().err


def test_a_batch_loses_no_recording(
    source: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    speech = read_audio(source)
    write_audio(speech, folder / "a.wav")
    write_audio(speech, folder / "a.flac", "flac")
    arguments = ["edit", str(folder), "--denoise", "--checkpoint", str(tiny), *FAST]
    assert run([*arguments, "-o", str(folder)]) == 2
    assert run([*arguments, "-o", str(source)]) == 2
    assert run([*arguments, "-o", str(source / "below")]) == 6
    assert "would overwrite" in capsys.readouterr().err
    assert run([*arguments, "-o", str(tmp_path / "results")]) == 0
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["a.flac.wav", "a.wav.wav"]


def test_standard_input_and_output_carry_audio(source: Path, tiny: Path) -> None:
    process = command("edit", "-", "--denoise", "--checkpoint", tiny, *FAST, stdin=subprocess.PIPE)
    stdout, stderr = process.communicate(source.read_bytes(), timeout=120)
    assert process.returncode == 0, stderr.decode()
    assert read_audio(stdout).sample_rate_hz == 24_000


def silent(path: Path) -> None:
    soundfile.write(path, np.zeros(24_000), 24_000)


def too_short(path: Path) -> None:
    soundfile.write(path, 0.1 * np.ones(100), 24_000)


def too_long(path: Path) -> None:
    soundfile.write(path, 0.1 * np.sin(np.arange(8_000 * 130) / 9), 8_000)


def empty(path: Path) -> None:
    path.touch()


def not_audio(path: Path) -> None:
    path.write_text("words")


def missing(path: Path) -> None:
    assert not path.exists()


BAD_SOURCES = (empty, silent, too_short, too_long, not_audio, missing)


@pytest.mark.parametrize("make", BAD_SOURCES)
def test_a_recording_that_cannot_be_used_is_refused_by_name(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None]
) -> None:
    path, out = tmp_path / "bad.wav", tmp_path / "out.wav"
    make(path)
    assert run(["edit", str(path), "--denoise", "-o", str(out), "--checkpoint", str(tiny)]) == 2
    told = capsys.readouterr().err
    assert "bad.wav" in told.replace("\n", "")
    assert len(told.splitlines()) >= 2
    assert [entry.name for entry in tmp_path.iterdir() if entry != path] == []


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--emotion", "hapy"], 2, "happy"),
        (["--style", "wisper"], 2, "whisper"),
        (["--speed", "quicker"], 2, "faster"),
        (["--speed", "remove"], 2, "no known speed tag"),
        (["--emotion", "x" * 70], 2, "no known emotion tag"),
        (["--paralinguistic", "word " * 1000], 2, "at most 4096 characters"),
        (["--paralinguistic", " "], 2, "blank"),
        (["--emotion", "happy", "--text", "word " * 1000], 2, "text: String should have at most 4096 characters"),
        (["--paralinguistic", "Well [Laufter] yes."], 2, "Laughter"),
        (["--emotion", "happy", "--text", "Привет, как дела?"], 2, "Cyrillic"),
        ([], 2, "one edit"),
        (["--emotion", "happy", "--denoise"], 2, "one edit"),
        (["--denoise", "-o", "out.txt"], 2, "suffix"),
        (["--denoise", "-o", "nowhere/out.wav"], 6, "does not exist"),
        (["--denoise", "--checkpoint", "nothing-here"], 3, "nothing-here"),
        (["--denoise", "--seed", "-1"], 2, "seed"),
        (["--denoise", "--seed", str(2**31)], 2, "seed"),
        (["--denoise", "-o", "in.wav"], 2, "would overwrite"),
        (["--denoise", "-o", "folder.wav"], 6, "is a folder"),
        (["--denoise", "--json", "-o", "-"], 2, "standard output"),
        (["--denoise", "--device", "cuda:77"], 2, "no device 'cuda:77'"),
        (["--denoise", "--device", "tpu"], 2, "cuda:N"),
        (["--denoise", "--picture", "nowhere/x.png"], 6, "does not exist"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(
    source: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], code: int, told: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.wav").mkdir()
    before = sorted(tmp_path.iterdir())
    assert run(["edit", str(source), "--checkpoint", str(tiny), *arguments]) == code
    captured = capsys.readouterr()
    assert told in (captured.out + captured.err).replace("\n", " ")
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_transcript_is_asked_for(source: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source.with_suffix(".txt").unlink()
    assert run(["edit", str(source), "--emotion", "happy", "--checkpoint", str(tiny), "--json"]) == 2
    error = report(capsys)["error"]
    assert error["code"] == "missing_text"
    assert "--asr" in error["hint"]


def test_a_damaged_checkpoint_is_named(
    source: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    [flow] = broken.rglob("flow.*")
    out = tmp_path / "out.wav"
    arguments = ["edit", str(source), "--denoise", "-o", str(out), "--checkpoint", str(broken), *FAST]
    for damage in (lambda: flow.write_bytes(flow.read_bytes()[:100]), flow.unlink):
        damage()
        assert run(arguments) == 3
        told = capsys.readouterr().err
        assert "flow" in told
        assert "Traceback" not in told
        assert not out.exists()


def test_a_full_disk_leaves_no_result_under_its_name(
    source: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shared.files.os", SimpleNamespace(**{**vars(os), "fsync": full}))
    out = tmp_path / "out.wav"
    assert run(["edit", str(source), "--denoise", "-o", str(out), "--checkpoint", str(tiny), *FAST]) == 6
    assert "disk is full" in capsys.readouterr().err
    assert list(tmp_path.glob("*out*")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_it_cleanly(tiny: Path, tmp_path: Path, number: signal.Signals) -> None:
    out, scratch = tmp_path / "out.wav", tmp_path / "scratch"
    scratch.mkdir()
    process = command(
        "edit", SPEECH, "--emotion", "happy", "--iterations", "10", "-o", out, "--checkpoint", tiny,
        env={**os.environ, "TMPDIR": str(scratch)},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(scratch.glob("editx-*/artifacts/objects/jobs/*/0-tokenize/*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted" in stderr.decode()
    assert "Traceback" not in stderr.decode()
    assert not out.exists()
    assert list(scratch.glob("editx-*")) == []


def test_a_tag_that_the_checkpoint_was_not_trained_on_warns(
    source: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partly = tmp_path / "partly"
    shutil.copytree(tiny, partly)
    trained = {"name": "partly", "version": "1", "trained_on": {"emotion": ["sad"], "denoise": True}}
    (partly / "editx.json").write_text(json.dumps(trained))
    out = ["-o", str(tmp_path / "out.wav"), "--checkpoint", str(partly), *FAST]
    assert run(["edit", str(source), "--emotion", "happy", *out]) == 0
    assert "was not trained on emotion happy" in capsys.readouterr().err.replace("\n", " ")
    assert run(["edit", str(source), "--emotion", "sad", *out]) == 0
    assert "was not trained" not in capsys.readouterr().err
    assert run(["clone", str(source), "--text", "Hi [laugh] there.", *out]) == 0
    assert "was not trained on [laugh]" in capsys.readouterr().err.replace("\n", " ")


def test_a_voice_is_stored_cloned_by_name_and_removed(
    source: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDITX_HOME", str(tmp_path / "home"))
    assert run(["voices", "add", "ann", str(source)]) == 0
    assert run(["voices", "add", "ann", str(source)]) == 2
    assert run(["voices", "add", "../ann", str(source)]) == 2
    capsys.readouterr()
    assert run(["voices", "list", "--json"]) == 0
    [voice] = json.loads(capsys.readouterr().out)
    assert (voice["name"], voice["text"], voice["duration_s"]) == ("ann", TEXT, 1.0)
    assert run(["voices", "add", "bob", str(source), "--text", "Well [Laughter] yes."]) == 0
    assert run(["voices", "list"]) == 0
    assert "Well [Laughter] yes." in capsys.readouterr().out
    out = tmp_path / "said.wav"
    assert run(["clone", "ann", "--text", "Hi.", "-o", str(out), "--checkpoint", str(tiny), *FAST]) == 0
    assert out.exists()
    assert run(["voices", "remove", "ann"]) == 0
    assert run(["voices", "remove", "ann"]) == 2
    source.with_suffix(".txt").write_bytes(b"\xff\xfe")
    assert run(["voices", "add", "ann", str(source)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    monkeypatch.setenv("EDITX_HOME", str(out))
    assert run(["voices", "add", "ann", str(source), "--text", TEXT]) == 6


def test_a_file_is_cloned_with_its_text(source: Path, tiny: Path, tmp_path: Path) -> None:
    source.with_suffix(".txt").unlink()
    out = tmp_path / "said.mp3"
    arguments = ["clone", str(source), "--text", "Hi.", "-o", str(out), "--checkpoint", str(tiny), *FAST]
    assert run(arguments) == 2
    assert run([*arguments, "--ref-text", TEXT]) == 0
    assert out.exists()


def test_tokens_are_written_and_decoded_again(
    source: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens, out = tmp_path / "tokens.safetensors", tmp_path / "out.wav"
    assert run(["tokenize", str(source), "-o", str(tokens), "--checkpoint", str(tiny), "--json"]) == 0
    told = report(capsys)
    assert told["audio_tokens"] == 5 * min(told["linguistic"] // 2, told["semantic"] // 3)
    assert run(["decode", str(tokens), "-o", str(out), "--checkpoint", str(tiny), "--steps", "2"]) == 0
    assert read_audio(out).duration_s == pytest.approx(told["audio_tokens"] / 5 * 0.12, abs=0.1)
    assert run(["decode", str(source), "-o", str(out), "--checkpoint", str(tiny)]) == 2
    for wrong, code in (("out.txt", 2), ("nowhere/out.wav", 6)):
        assert run(["decode", str(tokens), "-o", str(tmp_path / wrong), "--checkpoint", "not-looked-for"]) == code
    nowhere = tmp_path / "nowhere" / "tokens.safetensors"
    assert run(["tokenize", str(source), "-o", str(nowhere), "--checkpoint", "not-looked-for"]) == 6


def test_the_doctor_finds_what_a_checkpoint_lacks(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor", "--checkpoint", str(tiny), "--json"]) == 0
    assert report(capsys)["ok"]
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    assert run(["doctor", "--checkpoint", str(lacking), "--json"]) == 3
    missing = {finding["what"]: finding["state"] for finding in report(capsys)["findings"] if not finding["ok"]}
    assert missing["language model"] == "missing"
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny, damaged)
    next(damaged.rglob("flow.pt")).write_bytes(b"damaged")
    assert run(["doctor", "--checkpoint", str(damaged)]) == 3
    assert "flow" in capsys.readouterr().out
    assert run(["doctor", "--checkpoint", str(damaged), "--json"]) == 3
    [wrong] = [finding for finding in report(capsys)["findings"] if not finding["ok"]]
    assert (wrong["what"], wrong["state"]) == ("flow", "wrong")
    assert "checkpoint verify" in wrong["hint"]


def test_what_the_operating_system_refuses_is_a_message(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: Path, **_: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", closed)
    assert run(["checkpoint", "info", str(tiny)]) == 2
    assert "editx.json:Permissiondenied." in "".join(capsys.readouterr().err.split())  # wherever the lines break


def test_help_and_usage_errors_have_their_codes() -> None:
    assert run(["--help"]) == 0
    assert run(["edit", "--help"]) == 0
    assert run(["nonsense"]) == 2
    assert run(["edit"]) == 2
