"""Answers made audible and rated by the acoustic judges: fits the judges, rates candidates.

Judges are fitted on recordings that went through the codes and the decoder, as answers do, against the neutral one of
the same voice that went the same way: what the decoder does to every voice is not taken for an emotion. Two judges
learn from different recordings: one makes preferences, the other is kept for tests.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

from services.trainer.data.margin import MarginScorer
from services.trainer.data.preferences import Rating, Weights, composite
from services.trainer.data.rows import Row
from services.trainer.evaluate.acoustic import (
    AcousticJudge,
    Audio,
    Classifier,
    Vector,
    change,
    features,
    pair_features,
)
from services.trainer.evaluate.runner import at_16k
from services.trainer.evaluate.system import PortSystem
from services.trainer.recipes.post_train.material import NEUTRAL, Item, Material, Part
from services.trainer.recipes.post_train.workplace import Workplace
from shared.artifacts import Tokenized
from shared.codes import Codes
from shared.errors import EditxError, UserError

log = logging.getLogger(__name__)

TASKS = ("emotion", "style")
CLEAR = 0.6
"""Weaker readings do not tell a judge what their label sounds like; margins are learned from all."""


def fit_judge(
    material: Material, part: Part, system: PortSystem, count: int, workers: int
) -> tuple[AcousticJudge, dict[str, float]]:  # fmt: skip
    """A judge from up to `count` clear recordings of a part; accuracy per task on a fifth that was held back."""
    tasks = {}
    report = {}

    @cache
    def neutral(source: Item) -> tuple[Tokenized, Audio]:
        """What decoding in a voice needs, and the neutral recording of it decoded."""
        voice = system.tokenize(source.audio())
        return voice, at_16k(system.decode(source.mixed, voice))

    for task in TASKS:
        clear = [pair for pair in material.pairs(part, (task,)) if pair[1].strength >= CLEAR]
        chosen = clear[: count // len(TASKS)]
        plain = [(source, source) for source in {pair[0].id: pair[0] for pair in chosen}.values()]
        pairs = [*chosen, *plain[: max(2, len(chosen) // 4)]]

        def moved(pair: tuple[Item, Item]) -> Vector | None:
            source, target = pair
            try:
                voice, before = neutral(source)
                after = at_16k(system.decode(target.mixed, voice, seed=1))
                return change(before, after, (source.text, target.text))
            except UserError as error:
                log.warning("recording %s teaches no judge: %s", target.id, error)
                return None

        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(moved, pairs))
        x = [vector for vector in found if vector is not None]
        labels = [
            "neutral" if target.manner == NEUTRAL else target.manner.partition("/")[2]
            for (_, target), vector in zip(pairs, found, strict=True) if vector is not None
        ]  # fmt: skip
        learned = [k for k in range(len(x)) if k % 5]
        if len({labels[k] for k in learned}) < 2:
            raise UserError(f"The part {part} has {len(x)} clear recordings for {task}: too few to fit a judge.",
                            "Raise record.groups and start with a new work folder.", "too_few_recordings")  # fmt: skip
        held = [k for k in range(len(x)) if k % 5 == 0]
        trial = Classifier.fit([x[k] for k in learned], [labels[k] for k in learned])
        guesses = trial.predict([x[k] for k in held])
        report[task] = float(np.mean([g == labels[k] for g, k in zip(guesses, held, strict=True)]))
        tasks[task] = Classifier.fit(x, labels)
    return AcousticJudge(tasks), report


def fit_margins(material: Material, judge: AcousticJudge, count: int) -> MarginScorer:
    """A margin scorer whose annotated set are pairs of originals, rated 1 to 10 by a judge that knows the labels."""
    x, categories, ratings = [], [], []
    for source, target in material.pairs("judge_a", TASKS)[:count]:
        task, _, tag = target.manner.partition("/")
        before, after = (at_16k(item.audio()) for item in (source, target))
        x.append(pair_features(before, after))
        categories.append(f"{task} {tag}")
        ratings.append(judge.rating(task, tag, before, after, (source.text, target.text)))
    return MarginScorer.fit(x, categories, ratings)


def rate(
    work: Workplace, rows: Sequence[Row], answers: Sequence[Codes], judges: Sequence[AcousticJudge],
    system: PortSystem, weights: Weights, workers: int,
) -> list[list[float]]:  # fmt: skip
    """Each judge's composite rating, 1 to 10, of each answer to the row of the same place; 1 where nothing is heard.

    Correctness is the judge's rating of the wanted tag; naturalness falls with the distance of the answer's length from
    the target's, the one fault of naturalness that an acoustic judge can see.
    """

    def one(place: int) -> list[float]:
        row, mixed = rows[place], answers[place]
        try:
            reference, before = work.reference(row)
            moved = features(at_16k(system.decode(mixed, reference, seed=place)), row.target.text) - before
        except EditxError as error:
            log.warning("an answer to %s is rated 1, nothing is heard: %s", row.id, error)
            return [1.0 for _ in judges]
        stretch = abs(float(np.log2(max(len(mixed), 5) / len(row.target.mixed))))
        natural = 10 - 9 * min(1.0, stretch)
        ratings = []
        for judge in judges:
            correct = 1 + 9 * judge.score_change(row.edit.type, row.edit.detail or "", moved)
            rating = Rating(candidate=str(place), rater="acoustic", correctness=correct, naturalness=natural)
            ratings.append(composite(rating, weights))
        return ratings

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, range(len(rows))))
