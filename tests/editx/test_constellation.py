"""A benchmark by jobs of the hosted system: several at a time, and going on where it stopped."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from editx.cli.app import run
from services.trainer.evaluate import asking
from services.trainer.evaluate.remote import Question, Verdict
from tests.fixtures.gateways import serving


class Judge:
    """Hears what was wanted."""

    name = "agreeable"

    def hears(self, task: str) -> bool:
        return True

    def ask(self, question: Question, wav: bytes, source_wav: bytes) -> Verdict:
        assert soundfile.info(io.BytesIO(wav)).frames > 0
        return Verdict(question.wanted, 9.0)


def write_benchmark(folder: Path, count: int) -> Path:
    time = np.arange(16_000) / 16_000
    soundfile.write(folder / "voice.wav", (0.3 * np.sin(2 * np.pi * 200 * time)).astype(np.float32), 16_000)
    case = {"speaker": "s", "prompt_audio": "voice.wav", "prompt_text": "I just finished", "lang": "en",
            "task": "emotion", "task_sub": "happy"}  # fmt: skip
    lines = [json.dumps(case | {"id": k, "gen_text": f"you know {k}"}) for k in range(count)]
    path = folder / "bench.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_a_benchmark_runs_by_jobs_and_goes_on(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(asking, "open_judge", lambda *_, **__: Judge())
    with serving(tiny, tmp_path / "system") as served:
        arguments = ["eval", "run", str(write_benchmark(tmp_path, 2)), "--gateway", served.url, "--iterations", "1",
                     "--workers", "2", "--out", str(tmp_path / "out")]  # fmt: skip
        assert run(arguments) == 0
        jobs = served.system.jobs.list(limit=100).jobs
        assert sorted(job.request.edit.type for job in jobs if job.request.edit) == ["clone", "clone"] + ["emotion"] * 2
        assert {job.request.lane for job in jobs} == {"batch"}
        assert "| emotion | all | Iter1 | 2 |" in capsys.readouterr().out
        write_benchmark(tmp_path, 3)
        assert run(arguments) == 0
        assert len(served.system.jobs.list(limit=100).jobs) == 6, "the third case only"
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 3
