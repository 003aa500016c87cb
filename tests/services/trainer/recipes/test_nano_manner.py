"""An edit pays for what is missing of the asked manner."""

import numpy as np
import pytest

from services.trainer.core.sampling import Answer
from services.trainer.recipes.nano import manner, words
from services.trainer.recipes.nano.codes import Item
from services.trainer.recipes.nano.manner import average_changes
from services.trainer.recipes.nano.words import Prompt, Readings
from shared.models.prosody import AIMS, SCALES
from shared.models.recognizer import letters
from tests.services.trainer.conftest import make_row, random_codes

PLAIN = np.array([5.0, 2.0, 4.0, -6.0, 0.7])


def prompts(tokenizer) -> tuple[Prompt, Prompt]:
    """A clone and an edit of the manner."""
    ids, plain = (np.array(tokenizer.encode_chat(make_row(number).turns()), np.int64) for number in (0, 1))
    other = Prompt(ids, 6, letters("so it is"), 3)
    return other, other._replace(readings=Readings(random_codes(2, 1), random_codes(3, 2), plain))


def test_only_edits_pay_for_their_manner(tokenizer) -> None:
    other, edit = prompts(tokenizer)
    answers = [Answer(random_codes(groups, groups), True) for groups in (3, 4)]
    found = np.stack([PLAIN, PLAIN + SCALES, PLAIN + AIMS * SCALES, PLAIN])
    cost = manner.manner_cost(lambda _: found, manner.CPU)  # type: ignore[arg-type]
    assert cost(other, answers) == pytest.approx(words.timing(other, answers))
    first, second = cost(edit, answers)
    assert first == pytest.approx(0)
    assert second == pytest.approx(manner.CPU.timing * np.log(4 / 3) + manner.CPU.cost * AIMS.mean())


def test_a_manner_changes_what_its_readings_differ_in_from_the_plain_ones_on_average() -> None:
    def reading(group: int, name: str, text: str = "so it is") -> Item:
        return {"row": {"group": group, "manner": name, "text": text}, "clean": (np.zeros(2, int), np.full(3, group))}

    items = [reading(1, "neutral"), reading(1, "emotion/sad"), reading(2, "neutral"), reading(2, "emotion/sad"),
             reading(3, "emotion/sad"), reading(4, "neutral", "不是"), reading(4, "emotion/sad", "不是")]  # fmt: skip
    measures = iter([np.array([[0.0] * 5, [1.0] * 5]), np.array([[2.0] * 5, [4.0, np.nan, 4.0, 4.0, 4.0]])])
    found = average_changes(items, lambda _: next(measures))  # type: ignore[arg-type]
    assert found == {"emotion/sad": [1.5, 1.0, 1.5, 1.5, 1.5]}
