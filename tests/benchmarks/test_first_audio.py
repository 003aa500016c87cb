"""The benchmark of the first audio, with one call of each kind."""

from benchmarks.first_audio import measure
from editx.embedded import Embedded
from shared.checkpoints.layout import Checkpoint


def test_first_audio_is_measured_with_new_and_known_voices_and_split_into_stages() -> None:
    with Embedded(Checkpoint.resolve("nano")) as system:
        rows = measure(system, calls=1, steps=1, text="Yes.")
    assert list(rows) == ["a new voice", "a known voice"]
    for row in rows.values():
        parts = row["tokenizer s"] + row["llm s"] + row["decoder s"]
        assert 0 < parts <= row["first audio s"]
        assert row["of sound s"] > 0
    assert rows["a known voice"]["tokenizer s"] < rows["a new voice"]["tokenizer s"]
