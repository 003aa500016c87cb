"""Candidates: answers of a checkpoint to the prompts of a set, made audible, judged, and what they tell of the prompts.

A folder of candidates holds candidates.jsonl, which `editx data rate` shows to people and `editx data judge` to judges,
and the recordings. Each step goes on where it stopped. Knows nothing about training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict

from services.trainer.core.runs import write_json
from services.trainer.core.sampling import bounds_for
from services.trainer.data.manifest import Dataset
from services.trainer.data.preferences import CANDIDATES_PER_PROMPT, Candidate, Rating, read_ratings
from services.trainer.data.rating import Item
from services.trainer.data.records import checked, records
from services.trainer.data.rows import Row
from services.trainer.evaluate.hearing import HIGHEST, labels_of, question_about, share_of, speak_source
from services.trainer.evaluate.remote import Judge
from services.trainer.evaluate.system import SEED_STRIDE, PortSystem
from shared.audio.io import write_audio
from shared.codes import GROUP
from shared.errors import PermanentError, UserError
from shared.schemas.edit import Edit

CANDIDATES = "candidates.jsonl"
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Draws:
    """How candidates are drawn; an answer is at most `stretch` times as long as its source, and some groups more."""

    count: int = CANDIDATES_PER_PROMPT
    temperature: float = 0.9
    seed: int = 0
    stretch: float = 2.0
    extra_groups: int = 8


class Heard(Candidate, Item):
    """A line of candidates.jsonl: an answer, what is to be shown of it, and the edit that was asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    edit: Edit
    source_text: str


def make_candidates(
    prompts: Dataset, system: PortSystem, made_by: str, folder: Path, draws: Draws, *, workers: int = 2,
    progress: Progress = lambda fraction, note: None,
) -> int:  # fmt: skip
    """Draw and decode `draws.count` answers to every prompt; how many there are in the folder.

    An answer without tokens is left out. Raises UserError for prompts without recordings and for a folder that other
    candidates lie in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, {"prompts": prompts.content_hash, "made_by": made_by, **asdict(draws)})
    path = folder / CANDIDATES
    done = {one.prompt for one in read_heard(path)} if path.exists() else set()
    drawing = replace(system, temperature=draws.temperature)
    with ThreadPoolExecutor(workers) as pool:
        for number, row in enumerate(prompts.rows):
            if row.id not in done:
                lines = _candidates(row, number, prompts, drawing, folder, draws, pool)
                with path.open("a", encoding="utf-8") as file:
                    file.write("".join(line.model_dump_json() + "\n" for line in lines))
            progress((number + 1) / len(prompts.rows), f"{number + 1} of {len(prompts.rows)} prompts")
    return len(read_heard(path))


def _candidates(
    row: Row, number: int, prompts: Dataset, system: PortSystem, folder: Path, draws: Draws, pool: ThreadPoolExecutor
) -> list[Heard]:  # fmt: skip
    source = speak_source(system, prompts, row)
    seeds = [draws.seed + (number * draws.count + k) * SEED_STRIDE for k in range(draws.count)]
    limit = bounds_for(len(row.source.mixed), draws.stretch, draws.extra_groups)
    answers = system.answers(row.turns(), limit, seeds)
    before = f"sources/{number:05d}.wav"
    (folder / before).parent.mkdir(exist_ok=True)
    write_audio(source.decoded, folder / before, "wav")
    (folder / "audio").mkdir(exist_ok=True)

    def one(k: int) -> Heard | None:
        if len(answers[k]) < GROUP:
            return None
        after, id = f"audio/{number:05d}-{k:02d}.wav", f"{row.id}.{k}"
        write_audio(system.decode(answers[k], source.tokens, seed=k), folder / after, "wav")
        asked = str(row.edit) if row.edit.target_text is None else f"{row.edit.type}: {row.edit.target_text}"
        return Heard(
            id=id, prompt=row.id, mixed=answers[k], candidate=id, instruction=asked, text=row.target.text,
            source=Path(before), audio=Path(after), edit=row.edit, source_text=row.source.text,
        )  # fmt: skip

    found = [line for line in pool.map(one, range(draws.count)) if line is not None]
    if not found:
        raise PermanentError(f"The language model gave no audio tokens for {row.id}.", "Look at the checkpoint.")
    return found


def read_heard(path: Path) -> list[Heard]:
    """The lines of candidates.jsonl. Raises UserError naming the bad one."""
    return [checked(Heard, line, path, number) for number, line in records(path)]


def judge_candidates(
    path: Path, judge: Judge, out: Path, *, workers: int = 2, progress: Progress = lambda fraction, note: None
) -> tuple[int, int]:  # fmt: skip
    """Append a judge's ratings (1 to 10) of the candidates that it has not rated; how many, and what it cannot hear.

    Raises BudgetSpent and what an API fails with; the next call goes on.
    """
    lines = read_heard(path)
    if not lines:
        raise UserError(f"{path} holds no candidates.", code="invalid_dataset")
    rated = {one.candidate for one in read_ratings(out) if one.rater == judge.name} if out.exists() else set()
    labels = labels_of([line.edit for line in lines])
    for line in lines:
        for name in (line.audio, line.source):
            if not (path.parent / name).is_file():
                raise UserError(f"{path}, candidate {line.id}: there is no recording {path.parent / name}.",
                                "Draw the candidates again.", "bad_row")  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    heard = [line for line in lines if line.edit.type in HIGHEST and judge.hears(line.edit.type)]
    todo = [line for line in heard if line.id not in rated]

    def one(line: Heard) -> Rating:
        question = question_about(line.edit, line.source_text, labels.get(line.edit.type, ()))
        after, before = ((path.parent / name).read_bytes() for name in (line.audio, line.source))
        verdict = judge.ask(question, after, before)
        share = share_of(verdict, line.edit.type)
        return Rating(candidate=line.id, rater=judge.name, scale=10, correctness=1 + 9 * share,
                      naturalness=verdict.naturalness)  # fmt: skip

    with ThreadPoolExecutor(workers) as pool, out.open("a", encoding="utf-8") as file:
        for count, rating in enumerate(pool.map(one, todo), start=1):
            file.write(rating.model_dump_json(exclude_none=True) + "\n")
            file.flush()
            progress(count / len(todo), f"{count} of {len(todo)} candidates")
    return len(todo), len(lines) - len(heard)


def prompt_scores(prompts: Dataset, lines: Sequence[Heard], scores: Mapping[str, float]) -> list[float]:
    """The mean score of the candidates of each prompt. Raises UserError naming a prompt whose answers nobody rated."""
    found: dict[str, list[float]] = {}
    for line in lines:
        if line.id in scores:
            found.setdefault(line.prompt, []).append(scores[line.id])
    missing = [row.id for row in prompts.rows if row.id not in found]
    if missing:
        raise UserError(f"No answer to the prompt {missing[0]} was rated ({len(missing)} such prompts).",
                        "Rate or judge the candidates first.", "invalid_dataset")  # fmt: skip
    return [float(np.mean(found[row.id])) for row in prompts.rows]


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "settings.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        raise UserError(f"{folder} holds candidates of other prompts, another checkpoint or other settings.",
                        "Choose another folder.", "run_conflict")  # fmt: skip
    write_json(path, settings)
