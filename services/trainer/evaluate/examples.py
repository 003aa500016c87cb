"""The acoustic judge from labelled recordings: each with a neutral one of the same voice. Knows files and features."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from services.trainer.data.records import bad_line, checked, records
from services.trainer.data.rows import reason
from services.trainer.evaluate.acoustic import NEUTRAL, AcousticJudge, Classifier, Vector, change
from services.trainer.evaluate.runner import at_16k
from shared.audio.io import read_audio
from shared.errors import EditxError, UserError
from shared.tags import check_tag


class Example(BaseModel):
    """One labelled recording. `source` (neutral) and `audio` are paths relative to the file of examples."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    task: str
    label: str = Field(min_length=1)
    source: Path
    audio: Path
    text: str = ""
    source_text: str = ""


def fit_acoustic_judge(path: Path) -> tuple[AcousticJudge, dict[str, int]]:
    """The judge and how many examples each task had. Raises UserError naming the line, or the task without labels."""
    tasks: dict[str, tuple[list[Vector], list[str]]] = {}
    for number, line in records(path):
        example = checked(Example, line, path, number)
        x, labels = tasks.setdefault(example.task, ([], []))
        try:
            label = example.label if example.label == NEUTRAL else check_tag(example.task, example.label)
            before, after = (at_16k(read_audio(path.parent / file)) for file in (example.source, example.audio))
            x.append(change(before, after, (example.source_text, example.text)))
        except EditxError as error:
            raise bad_line(path, number, reason(error).rstrip(".")) from error
        labels.append(label)
    if not tasks:
        raise UserError(f"{path} holds no examples.", code="invalid_training")
    for task, (_, labels) in tasks.items():
        if len(set(labels)) < 2 or NEUTRAL not in labels:
            raise UserError(f"{path}: the task {task} has the labels {', '.join(sorted(Counter(labels)))}.",
                            f"It needs {NEUTRAL} and one other at least.", "invalid_training")  # fmt: skip
    judge = AcousticJudge({task: Classifier.fit(x, labels) for task, (x, labels) in tasks.items()})
    return judge, {task: len(labels) for task, (_, labels) in tasks.items()}
