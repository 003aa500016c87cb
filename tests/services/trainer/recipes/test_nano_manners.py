"""What a manner changes is what its readings differ in from plain ones."""

import numpy as np

from services.trainer.recipes.nano.codes import Item
from services.trainer.recipes.nano.manners import average_changes


def test_a_manner_changes_what_its_readings_differ_in_from_the_plain_ones_on_average() -> None:
    def reading(group: int, name: str, text: str = "so it is") -> Item:
        return {"row": {"group": group, "manner": name, "text": text}, "clean": (np.zeros(2, int), np.full(3, group))}

    items = [reading(1, "neutral"), reading(1, "emotion/sad"), reading(2, "neutral"), reading(2, "emotion/sad"),
             reading(3, "emotion/sad"), reading(4, "neutral", "不是"), reading(4, "emotion/sad", "不是")]  # fmt: skip
    measures = iter([np.array([[0.0] * 5, [1.0] * 5]), np.array([[2.0] * 5, [4.0, np.nan, 4.0, 4.0, 4.0]])])
    found = average_changes(items, lambda _: next(measures))  # type: ignore[arg-type]
    assert found == {"emotion/sad": [1.5, 1.0, 1.5, 1.5, 1.5]}
