"""Answers made audible and rated by the acoustic judges: fits the judges, rates candidates.

Judges are fitted on recordings that went through the codes and the decoder, as answers do, against the neutral one of
the same voice that went the same way: what the decoder does to every voice is not taken for an emotion. Two judges
learn from different recordings: one makes preferences, the other is kept for tests.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from services.trainer.data.margin import MarginScorer
from services.trainer.data.preferences import Candidate, Rating, Weights, composite, pair_of
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
from services.trainer.evaluate.same_words import SameWords, Table
from services.trainer.evaluate.system import PortSystem
from services.trainer.recipes.post_train.material import CLEAR, NEUTRAL, Item, Material, Part, edit_towards
from services.trainer.recipes.post_train.workplace import Workplace
from shared.artifacts import Tokenized
from shared.codes import Codes
from shared.errors import EditxError, UserError
from shared.schemas.edit import Edit

log = logging.getLogger(__name__)

TASKS = ("emotion", "style")
PAIRS_PER_LABEL = 6


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


def fit_words(material: Material, table: Table, count: int) -> SameWords:
    """The scale of `SameWords` from up to `count` recordings of judge a's part and the readings of their sentences."""
    pairs = material.pairs("judge_a", TASKS)[:count]
    same = [(source.mixed, target.mixed) for source, target in pairs]
    other = [
        (source.mixed, target.mixed)
        for (source, _), (_, target) in zip(pairs, [*pairs[len(pairs) // 2 :], *pairs[: len(pairs) // 2]], strict=True)
        if source.text != target.text
    ]
    return SameWords.fit(table, same, other)


@dataclass(frozen=True)
class Heard:
    """An answer made audible. moved: changes of the acoustic features from its source (None where nothing is heard);
    naturalness and words: ratings from 1 to 10."""

    moved: list[float] | None
    naturalness: float
    words: float | None


@dataclass(frozen=True)
class Ears:
    """Whoever rates answers: the acoustic judges, one for the words where codes carry them, and how much each part
    counts."""

    judges: Sequence[AcousticJudge]
    words: SameWords | None
    weights: Weights = field(default_factory=Weights)

    def listen(
        self, work: Workplace, rows: Sequence[Row], answers: Sequence[Codes], system: PortSystem, workers: int
    ) -> list[Heard]:
        """Each answer to the row of the same place, decoded.

        Naturalness falls with the distance of the answer's length from the target's, the one fault of naturalness that
        an acoustic judge can see; words are compared with the target's.
        """

        def one(place: int) -> Heard:
            row, mixed = rows[place], answers[place]
            try:
                reference, before = work.reference(row)
                moved = features(at_16k(system.decode(mixed, reference, seed=place)), row.target.text) - before
            except EditxError as error:
                log.warning("an answer to %s is rated 1, nothing is heard: %s", row.id, error)
                return Heard(None, 1.0, None)
            stretch = abs(float(np.log2(max(len(mixed), 5) / len(row.target.mixed))))
            words = self.words.rating(mixed, row.target.mixed) if self.words is not None else None
            return Heard([float(x) for x in moved], 10 - 9 * min(1.0, stretch), words)

        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(one, range(len(rows))))

    def rate(self, judge: AcousticJudge, edit: Edit, heard: Heard, naturalness: float | None = None) -> float:
        """The composite rating, 1 to 10, of what was heard; correctness is the judge's rating of the wanted tag."""
        if heard.moved is None:
            return 1.0
        correct = 1 + 9 * judge.score_change(edit.type, edit.detail or "", np.array(heard.moved))
        rating = Rating(
            candidate="", rater="acoustic", scale=10, correctness=correct, naturalness=naturalness, words=heard.words
        )
        return composite(rating, self.weights)

    def ratings(self, row: Row, heard: Heard) -> list[float]:
        """Each judge's rating of an answer to what its row asks for."""
        return [self.rate(judge, row.edit, heard, heard.naturalness) for judge in self.judges]


def relabelled(
    rows: Mapping[str, Row], candidates: Sequence[tuple[Candidate, Heard]], ears: Ears, margin: float, count: int,
    seed: int,
) -> list[Row]:  # fmt: skip
    """Preferences for edits that nobody asked for: all answers to one source, rated for every label of the first judge.

    An answer that was to be happy and came out sad is a good one to "sad". Up to `count` pairs, at most PAIRS_PER_LABEL
    of a source and a label, further apart than the margin. Lengths are not rated: no reading of that label is known.
    """
    judge, rng = ears.judges[0], np.random.default_rng((seed, 9))
    sources: dict[str, list[tuple[Candidate, Heard]]] = defaultdict(list)
    for candidate, heard in candidates:
        if heard.moved is not None:
            sources[rows[candidate.prompt].source.sha256].append((candidate, heard))
    labels = [(task, label) for task in TASKS for label in judge.tasks[task].labels if label != NEUTRAL]
    made = []
    for own in sources.values():
        for task, label in labels:
            edit = edit_towards(f"{task}/{label}")
            rated = [(ears.rate(judge, edit, heard), candidate) for candidate, heard in own]
            order = rng.permutation(len(rated))
            pairs = [
                (rated[a], rated[b]) for a in order for b in order if a != b and rated[a][0] - rated[b][0] > margin
            ]
            for better, worse in (pairs[k] for k in rng.permutation(len(pairs))[:PAIRS_PER_LABEL]):
                prompt = rows[better[1].prompt].model_copy(update={"edit": edit})
                made.append(pair_of(prompt, better[1], worse[1], better[0] - worse[0], "acoustic judge a, relabelled"))
    named = [row.model_copy(update={"id": f"{k}-{row.edit.detail}-relabelled"}) for k, row in enumerate(made)]
    return [named[k] for k in rng.permutation(len(named))[:count]]
