"""The benchmark that a post-training is held to, and what came out as one page for docs/experiments.md.

Knows the work folder and the material, not how anything is trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from services.trainer.data.emotion_texts import fitting
from services.trainer.evaluate.benchmark import Case, write_cases
from services.trainer.recipes.post_train.listening import TASKS
from services.trainer.recipes.post_train.material import NEUTRAL, Material
from services.trainer.recipes.post_train.workplace import Workplace
from shared.audio.io import write_audio

OUTCOME = "experiment.md"


def write_benchmark(material: Material, folder: Path, count: int, seed: int) -> int:
    """Up to `count` cases of held-out voices and texts in the published format, every label in turn, emotions
    with a text that fits where there is one; how many."""
    folder.mkdir(exist_ok=True)
    neutral = [item for item in material.benchmark if item.manner == NEUTRAL]
    manners = sorted({i.manner for i in material.training if i.manner.partition("/")[0] in TASKS})
    rng = np.random.default_rng((seed, 3))
    cases = []
    for number in range(count if len(neutral) > 1 else 0):
        prompt = neutral[int(rng.integers(len(neutral)))]
        texts = [i.text for i in neutral if i.language == prompt.language and i.text != prompt.text]
        if not texts:
            continue
        task, _, label = manners[number % len(manners)].partition("/")
        texts = fitting(texts, label) if task == "emotion" else texts
        write_audio(prompt.audio(), folder / f"{prompt.id}.flac", "flac")
        cases.append(Case(
            id=str(number), speaker=prompt.speaker, gen_text=texts[int(rng.integers(len(texts)))],
            prompt_audio=f"{prompt.id}.flac", prompt_text=prompt.text, lang=prompt.language,
            task=task, task_sub=label,  # type: ignore[arg-type]
        ))  # fmt: skip
    write_cases(cases, folder / "cases.jsonl")
    return len(cases)


def write_outcome(work: Workplace, candidates: int, report: Path) -> Path:
    """experiment.md: the numbers of every stage that is done, their cost, and the report's tables."""
    lines = ["## Post-training of the small checkpoint", ""]
    for stage, describe in (("record", _record), ("judges", _judges), ("data", _data), ("preferences", _preferences),
                            ("reward", _reward), ("ppo", _ppo)):  # fmt: skip
        if work.is_done(stage):
            lines.append(f"- {stage}: {describe(work.summary(stage))}")
    lines += ["", f"Candidates per prompt: {candidates}. Best of 8 is judged by judge b, which made no preference.", ""]
    lines += ["| stage | wall s | CPU s |", "|---|---|---|"]
    for path in sorted((work.root / "stages").glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        cost = work.summary(path.stem).get("cost_of_last_start")
        lines += [f"| {path.stem} | {cost['wall_s']:.0f} | {cost['cpu_s']:.0f} |"] if cost else []
    target = work.root / OUTCOME
    target.write_text("\n".join(lines) + "\n\n" + report.read_text(encoding="utf-8"), encoding="utf-8")
    return target


def _record(found: dict[str, Any]) -> str:
    return f"{found['recordings']} recordings, {found['hours']:.2f} h, {found['left_out']} groups left out"


def _judges(found: dict[str, Any]) -> str:
    shown = [f"{name} {task} {100 * value:.0f} %" for name in ("judge_a", "judge_b")
             for task, value in found[name].items()]  # fmt: skip
    return f"accuracy on the fifth held back: {', '.join(shown)}"


def _data(found: dict[str, Any]) -> str:
    rows = found["large_margin"]["rows"]
    return f"{found['kept']} of {found['pool']} pairs have a large margin; {rows} rows per set, {found['cases']} cases"


def _preferences(found: dict[str, Any]) -> str:
    return "; ".join(f"{name}: {one['pairs']} pairs of {one['candidates']} candidates, mean rating {one['mean']:.2f}"
                     for name, one in found.items() if name in ("prompts", "held_out"))  # fmt: skip


def _reward(found: dict[str, Any]) -> str:
    held, best = found["held_out"], found["best_of"]
    right = "not measured, no pair is held out"
    if held:
        share, error = 100 * held["accuracy"], 100 * held["standard_error"]
        right = f"{share:.1f} % (standard error {error:.1f}) of {held['pairs']} held-out pairs"
    gain = f"{best['gain']:.2f} [{best['low']:.2f}, {best['high']:.2f}]"
    more = f"{found['train_pairs']} pairs, {found['relabelled']} relabelled, {found['contrasts']} contrasts; "
    return f"{more}right on {right}; best of 8 {best['picked']:.2f} against {best['random']:.2f} at random, gain {gain}"


def _ppo(found: dict[str, Any]) -> str:
    checks = found["checks"]
    if not checks:
        return f"{found['prompts']} prompts"
    first, last = checks[0], checks[-1]
    return (f"{found['prompts']} prompts; held-out reward {first['reward']:.3f} to {last['reward']:.3f}, judge a "
            f"{first['judge']:.3f} to {last['judge']:.3f}")  # fmt: skip
