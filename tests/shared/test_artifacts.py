"""Artifacts survive the way through bytes, and damaged ones are recognised."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.artifacts import Generated, Tokenized, _pack
from shared.errors import PoisonError

TOKENIZED = Tokenized(
    linguistic=np.array([1, 2, 3, 4], np.int32),
    semantic=np.array([7, 8, 9], np.int32),
    speaker_embedding=np.linspace(-1, 1, 192, dtype=np.float32),
    prompt_mel=np.ones((6, 80), np.float32),
    duration_s=0.25,
)


def test_a_tokenized_recording_survives():
    found = Tokenized.from_bytes(TOKENIZED.to_bytes())
    assert found.mixed.tolist() == [1, 2, 1031, 1032, 1033]
    assert np.array_equal(found.speaker_embedding, TOKENIZED.speaker_embedding)
    assert np.array_equal(found.prompt_mel, TOKENIZED.prompt_mel)
    assert found.duration_s == 0.25


@given(
    st.integers(0, 2**63 - 1), st.integers(1, 9), st.booleans(), st.none() | st.floats(-5, 5), st.floats(0.5, 2)
)  # fmt: skip
def test_generated_tokens_survive(seed, attempts, collapsed, score, stretch):
    mixed = np.array([1, 2, 1031, 1032, 1033], np.int32)
    found = Generated.from_bytes(Generated(mixed, seed, attempts, 0.12, collapsed, score, stretch).to_bytes())
    assert found.mixed.tolist() == mixed.tolist()
    assert (found.seed, found.attempts, found.collapsed, found.score) == (seed, attempts, collapsed, score)
    assert found.stretch == stretch


def test_the_same_artifact_has_the_same_bytes():
    assert TOKENIZED.to_bytes() == TOKENIZED.to_bytes()


def test_another_kind_or_a_later_version_is_not_read():
    with pytest.raises(PoisonError, match="found tokenized"):
        Generated.from_bytes(TOKENIZED.to_bytes())
    with pytest.raises(PoisonError, match="version 9"):
        Tokenized.from_bytes(TOKENIZED.to_bytes().replace(rb"\"version\": 1", rb"\"version\": 9"))


def test_wrong_shapes_and_absent_parts_are_named():
    with pytest.raises(PoisonError, match="mixed"):
        Generated.from_bytes(_pack("generated", {}, {"score": None, "seed": 1}))
    with pytest.raises(PoisonError, match="score"):
        Generated.from_bytes(_pack("generated", {"mixed": np.zeros(5, np.int32)}, {"seed": 1}))
    with pytest.raises(PoisonError, match="mixed is int64"):
        Generated.from_bytes(_pack("generated", {"mixed": np.zeros(5, np.int64)}, {"score": None}))


@given(st.integers(0, 4000), st.integers(0, 255))
def test_damage_is_recognised_or_harmless(position, value):
    blob = bytearray(TOKENIZED.to_bytes())
    blob[position % len(blob)] = value
    for damaged in (bytes(blob), bytes(blob[:position])):
        with contextlib.suppress(PoisonError):
            assert Tokenized.from_bytes(damaged).prompt_mel.shape[1] == 80
