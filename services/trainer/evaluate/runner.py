"""Run a benchmark: clone, edit again and again, judge and measure every iteration; resumable and parallel.

A case is done when its line stands in results.jsonl; audio and lines of finished cases are never made again. The system
under test and the judge are behind small interfaces.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soxr

from services.trainer.evaluate.acoustic import NEUTRAL, RATE_HZ, AcousticJudge, Audio
from services.trainer.evaluate.benchmark import Case, same_label
from services.trainer.evaluate.judges import Judges, similarity, word_errors, words
from services.trainer.evaluate.remote import NONE, BudgetSpent, Judge, Question, Verdict
from shared.audio.io import Waveform, read_audio, write_audio
from shared.errors import EditxError, UserError
from shared.schemas.edit import Edit

RESULTS = "results.jsonl"


class System(Protocol):
    """What is tested."""

    def clone(self, reference: Waveform, reference_text: str, text: str, seed: int) -> Waveform:
        """The text in the reference's voice."""
        ...

    def edit(self, source: Waveform, text: str, edit: Edit, seed: int) -> Waveform:
        """The edited recording; `text` is what the source says."""
        ...


class Measures(Protocol):
    """Numbers beside the accuracy, so that a gain that breaks words or voice is seen."""

    def measure(self, text: str, language: str, reference: Audio, audio: Audio) -> dict[str, float]:
        """Of a recording (16 kHz) that should say `text` in the voice of `reference`."""
        ...


class OfflineMeasures:
    """Word errors, speaker similarity and naturalness by the offline judges."""

    def __init__(self, judges: Judges) -> None:
        self._judges, self._lock = judges, threading.Lock()

    def measure(self, text: str, language: str, reference: Audio, audio: Audio) -> dict[str, float]:
        expected = words(text, language)
        with self._lock:  # the judges' models are not thread safe
            heard = words(self._judges.hear(audio, language), language)
            voices = [self._judges.voice(one) for one in (reference, audio)]
            natural = self._judges.naturalness(audio)
        return {"word_errors": float(word_errors(expected, heard)), "words": float(len(expected)),
                "similarity": similarity(*voices), "naturalness": natural}  # fmt: skip


class NoMeasures:
    """Only what needs no model."""

    def measure(self, text: str, language: str, reference: Audio, audio: Audio) -> dict[str, float]:
        return {}


class OfflineJudge:
    """The acoustic judge in the judges' interface: labels of emotion and style relative to a neutral reference."""

    name = "acoustic"

    def __init__(self, judge: AcousticJudge) -> None:
        self._judge = judge

    def hears(self, task: str) -> bool:
        """The tasks that it was fitted for."""
        return task in self._judge.tasks

    def ask(self, question: Question, wav: bytes, source_wav: bytes) -> Verdict:
        """Raises UserError for sounds between words, which it cannot hear."""
        if question.task == "paralinguistic":
            raise UserError("The acoustic judge does not hear laughter and the like.", "Use a remote judge.")
        source, audio = at_16k(read_audio(source_wav)), at_16k(read_audio(wav))
        texts = (question.source_text, question.text)
        label = same_label(self._judge.label(question.task, source, audio, texts))
        wanted = NEUTRAL if question.wanted == NONE else question.wanted
        return Verdict(label, self._judge.rating(question.task, wanted, source, audio, texts))


def at_16k(waveform: Waveform) -> Audio:
    """Samples at the judges' rate."""
    return np.asarray(soxr.resample(waveform.samples, waveform.sample_rate_hz, RATE_HZ), np.float32)


@dataclass(frozen=True)
class Setup:
    """How a benchmark is run. `fixed_prompt` edits iteration 0 every time instead of the newest result."""

    iterations: int = 3
    seed: int = 0
    workers: int = 1
    fixed_prompt: bool = False


def run(
    cases: Sequence[tuple[Case, Path]], system: System, judge: Judge, folder: Path, setup: Setup, *,
    measures: Measures | None = None, progress: Callable[[float, str], None] | None = None,
) -> list[dict[str, object]]:  # fmt: skip
    """All results, those of earlier calls included; failed cases stand there with their error and are tried again.

    Raises BudgetSpent when the judge may cost no more: the next call goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, lock = folder / RESULTS, threading.Lock()
    labels = _labels(cases)
    done = {str(line["key"]): line for line in read_results(folder) if "error" not in line}
    todo = [(case, audio) for case, audio in cases if case.key not in done]

    def one(case: Case, audio: Path) -> dict[str, object]:
        try:
            line = _case(case, audio, system, judge, folder, setup, measures or NoMeasures(), labels[case.task])
        except BudgetSpent:
            raise
        except EditxError as error:
            line = {"key": case.key, **case.model_dump(), "error": str(error)}
        with lock, path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return line

    with ThreadPoolExecutor(setup.workers) as pool:
        futures = [pool.submit(one, case, audio) for case, audio in todo]
        try:
            for count, future in enumerate(as_completed(futures), start=1):
                done[str(future.result()["key"])] = future.result()
                if progress is not None:
                    progress(count / len(todo), f"{count} of {len(todo)} cases")
        except BudgetSpent:
            pool.shutdown(cancel_futures=True)
            raise
    return [done[case.key] for case, _ in cases]


def _labels(cases: Sequence[tuple[Case, Path]]) -> dict[str, tuple[str, ...]]:
    """The closed choice of each task: the labels that occur in the benchmark."""
    found: dict[str, set[str]] = {}
    for case, _ in cases:
        found.setdefault(case.task, set()).add(same_label(case.task_sub))
    return {task: tuple(sorted(names)) for task, names in found.items()}


def _case(
    case: Case, audio: Path, system: System, judge: Judge, folder: Path, setup: Setup, measures: Measures,
    labels: tuple[str, ...],
) -> dict[str, object]:  # fmt: skip
    reference = read_audio(audio)
    reference_wav, reference_16k = write_audio(reference, None, "wav") or b"", at_16k(reference)
    wanted = same_label(case.task_sub)
    question = Question(case.task, wanted, case.gen_text, labels, case.prompt_text)
    before_wav = reference_wav
    iterations: list[dict[str, object]] = []
    first = current = system.clone(reference, case.prompt_text, case.words, setup.seed)
    text = case.words
    for number in range(setup.iterations + 1):
        if number:
            start = first if setup.fixed_prompt else current
            current = system.edit(start, case.words if setup.fixed_prompt else text, case.edit, setup.seed + number)
            text = case.gen_text
        file = folder / "audio" / f"{case.key}-iter{number}.wav"
        file.parent.mkdir(exist_ok=True)
        write_audio(current, file, "wav")
        verdict = judge.ask(question, file.read_bytes(), before_wav)
        if not number:  # an edit is compared with the clone that it changes: the same words by the same decoder
            before_wav, question = file.read_bytes(), replace(question, source_text=case.gen_text)
        found = measures.measure(case.words, case.lang, reference_16k, at_16k(current))
        score = verdict.rating if case.task == "paralinguistic" else float(verdict.label == wanted)
        iterations.append({
            "iteration": number, "audio": str(file.relative_to(folder)), "label": verdict.label, "score": score,
            "rating": verdict.rating, "duration_ratio": current.duration_s / first.duration_s, **found,
        })  # fmt: skip
    return {"key": case.key, **case.model_dump(), "judge": judge.name, "iterations": iterations}


def add_measures(
    cases: Sequence[tuple[Case, Path]], folder: Path, measures: Measures, *,
    progress: Callable[[float, str], None] | None = None,
) -> int:  # fmt: skip
    """Measure the recordings of a finished run that were not measured yet; how many there were.

    Results are written case by case, so that a killed call goes on where it was.
    """
    known = {case.key: (case, audio) for case, audio in cases}
    lines, count = read_results(folder), 0
    for number, line in enumerate(lines, start=1):
        case, audio = known[str(line["key"])]
        found: Any = line.get("iterations", [])
        todo = [one for one in found if "words" not in one]
        reference = at_16k(read_audio(audio)) if todo else None
        for one in todo:
            assert reference is not None
            one |= measures.measure(case.words, case.lang, reference, at_16k(read_audio(folder / one["audio"])))
            count += 1
        if todo:
            partial = folder / f"{RESULTS}.partial"
            partial.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines), encoding="utf-8")
            partial.replace(folder / RESULTS)
        if progress is not None:
            progress(number / len(lines), f"{number} of {len(lines)} cases measured")
    return count


def read_results(folder: Path) -> list[dict[str, object]]:
    """The lines of a result folder; the last line of a case counts."""
    path = folder / RESULTS
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return list({str(line["key"]): line for line in lines}.values())
