"""editx in Python, and the embedded system under it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from editx.api import Editor, Result, Source, load, read_source, told_by
from editx.embedded import Embedded
from shared.audio.io import Waveform, read_audio, write_audio
from shared.checkpoints.layout import Checkpoint
from shared.errors import MissingComponent, UserError
from shared.jobs import machine
from shared.jobs.port import Idempotency
from shared.jobs.sqlite import SqliteJobStore
from shared.schemas import DecodeSettings, Edit, JobRequest, JobState, StepTiming
from shared.store.folder import FolderStore
from tests.fixtures.tiny import with_reward

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def editor(tiny: Path) -> Iterator[Editor]:
    with Editor(tiny) as editor:
        yield editor


@pytest.fixture(scope="module")
def speech() -> Waveform:
    whole = read_audio(ROOT / "tests" / "data" / "audio" / "en_happy_prompt.wav")
    return Waveform(whole.samples[: whole.sample_rate_hz], whole.sample_rate_hz)


def test_three_lines_edit_a_recording(tiny: Path, tmp_path: Path, speech: Waveform) -> None:
    write_audio(speech, tmp_path / "in.wav")
    script = (
        "from editx import edit\n"
        f"result = edit({str(tmp_path / 'in.wav')!r}, text='Yes.', emotion='happy', checkpoint={str(tiny)!r})\n"
        f"result.save({str(tmp_path / 'out.wav')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)
    assert read_audio(tmp_path / "out.wav").sample_rate_hz == 24_000


def test_samples_bytes_and_files_are_the_same_source(editor: Editor, speech: Waveform, tmp_path: Path) -> None:
    write_audio(speech, tmp_path / "in.wav")
    exact = read_audio(tmp_path / "in.wav")
    sources: list[Source] = [
        tmp_path / "in.wav",
        (tmp_path / "in.wav").read_bytes(),
        exact,
        (exact.samples, exact.sample_rate_hz),
    ]
    results = [editor.edit(source, denoise=True, seed=3, steps=2) for source in sources]
    for result in results:
        assert isinstance(result, Result)
        np.testing.assert_array_equal(result.audio.samples, results[0].audio.samples)


def test_samples_of_any_form_are_mixed_and_scaled(speech: Waveform) -> None:
    exact, rate = (speech.samples * 32768).astype(np.int16), speech.sample_rate_hz
    stereo = np.stack([exact, exact], axis=1)
    for samples in (exact, stereo, stereo.T, stereo / 32768.0):
        found = read_source((samples, rate))
        np.testing.assert_allclose(found.samples, exact / 32768.0, atol=1e-6)


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        (np.zeros(24_000, np.float32), "silent"),
        (np.full(24_000, np.nan, np.float32), "no number"),
        (np.zeros((2, 2, 9), np.float32), "mono or stereo"),
        (np.zeros(0, np.float32), "lasts 0.000 s"),
        (np.array(["a"]), "mono or stereo"),
    ],
)
def test_samples_that_are_no_recording_are_refused(samples: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        read_source((samples, 24_000))
    if samples.ndim == 1 and samples.dtype == np.float32:
        with pytest.raises(UserError, match=told):
            read_source(Waveform(samples, 24_000))


def test_a_result_tells_its_iterations_seed_and_speed(editor: Editor, speech: Waveform) -> None:
    seen: list[str] = []
    result = editor.edit(
        speech, speed="faster", text="You know.", iterations=2, seed=3, steps=2, on_event=lambda e: seen.append(e.type)
    )
    assert len(result.iterations) == 2
    assert result.seed == 3
    assert result.rtf > 0
    assert seen[0] == "accepted"
    assert seen[-1] == "done"
    assert editor.edit(speech, denoise=True, steps=2).seed != editor.edit(speech, denoise=True, steps=2).seed


def test_several_threads_share_one_editor(editor: Editor, speech: Waveform) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda seed: editor.edit(speech, denoise=True, seed=seed, steps=2), [1, 2, 1]))
    np.testing.assert_allclose(together[0].audio.samples, together[2].audio.samples, atol=1e-4)


def test_tokens_decode_to_sound_of_their_length(editor: Editor, speech: Waveform) -> None:
    tokens = editor.tokenize(speech)
    audio = editor.decode(tokens, steps=2)
    assert audio.duration_s == pytest.approx(len(tokens.mixed) / 5 * 0.12, abs=0.1)


def test_a_wrong_request_is_refused_before_it_becomes_a_job(editor: Editor, speech: Waveform) -> None:
    before = len(editor.system.jobs.list(limit=1000).jobs)
    with pytest.raises(UserError, match="hapy"):
        editor.edit(speech, emotion="hapy", text="You know.")
    with pytest.raises(UserError, match="What is said"):
        editor.edit(speech, emotion="happy")
    with pytest.raises(UserError, match="one edit"):
        editor.edit(speech)
    assert len(editor.system.jobs.list(limit=1000).jobs) == before


def test_the_reward_model_chooses_between_candidates(tiny: Path, tmp_path: Path, speech: Waveform) -> None:
    judged = with_reward(tiny, tmp_path / "judged")
    with Editor(judged) as editor:
        result = editor.edit(speech, denoise=True, n_best=3, seed=3, steps=2)
    assert [timing.kind for timing in result.job.timings] == ["tokenize", "generate", "score", "decode"]
    assert result.job.timings[2].metrics["candidates"] == 3


@pytest.mark.parametrize(("n_best", "collapsed", "told"), [(1, 0, 0), (1, 1, 1), (3, 2, 0), (3, 3, 1)])
def test_a_result_without_a_proper_end_is_told(n_best: int, collapsed: int, told: int) -> None:
    request = JobRequest(edit=Edit(type="denoise"), n_best=n_best)
    timing = StepTiming(
        index=1, kind="generate", started_at=0.0, finished_at=1.0, attempts=1, metrics={"collapsed": collapsed}
    )
    job = machine.accept(request, 0.0, job_id="job_1").job.model_copy(update={"timings": (timing,)})
    assert len(told_by(job)) == told


def test_several_candidates_without_a_reward_model_are_refused_at_once(editor: Editor, speech: Waveform) -> None:
    with pytest.raises(MissingComponent, match="reward model"):
        editor.edit(speech, denoise=True, n_best=2)


def test_a_closed_editor_says_so_and_is_not_loaded_again(tiny: Path, speech: Waveform) -> None:
    with load(tiny) as closed:
        assert load(tiny) is closed
        tokens = closed.tokenize(speech)
    for call in (lambda: closed.edit(speech, vad=True), lambda: closed.tokenize(speech), lambda: closed.decode(tokens)):
        with pytest.raises(UserError, match="closed"):
            call()
    with load(tiny) as opened:
        assert opened is not closed
        assert opened.edit(speech, vad=True, steps=1).audio.duration_s > 0


def test_one_idempotency_key_is_one_job(editor: Editor, speech: Waveform) -> None:
    audio = write_audio(speech, None, "wav") or b""
    request = JobRequest(edit=Edit(type="denoise"), decode=DecodeSettings(steps=2))
    first = editor.system.submit(audio, request, idempotency=Idempotency("key", "body"))
    second = editor.system.submit(audio, request, idempotency=Idempotency("key", "body"))
    assert first.id == second.id
    assert editor.system.wait(first.id).state == JobState.DONE


def test_a_cancelled_job_ends_as_cancelled(editor: Editor, speech: Waveform) -> None:
    audio = write_audio(speech, None, "wav") or b""
    job = editor.system.submit(audio, JobRequest(edit=Edit(type="denoise"), iterations=10))
    editor.system.cancel(job.id)
    assert editor.system.wait(job.id).state == JobState.CANCELLED


def test_a_job_that_an_earlier_process_left_open_is_finished_by_the_next(
    tiny: Path, tmp_path: Path, speech: Waveform
) -> None:
    jobs, store = SqliteJobStore(tmp_path / "jobs.sqlite"), FolderStore(tmp_path / "artifacts")
    accepted = machine.accept(JobRequest(edit=Edit(type="vad"), decode=DecodeSettings(steps=2)), jobs.now())
    store.put(f"jobs/{accepted.job.id}/source/audio", write_audio(speech, None, "wav") or b"")
    jobs.create(accepted.job, accepted.events)
    jobs.close()
    with Embedded(Checkpoint.resolve(tiny), folder=tmp_path) as system:
        done = system.wait(accepted.job.id)
        assert done.state == JobState.DONE
        assert read_audio(system.store.get(done.result_keys[-1])).duration_s > 0
