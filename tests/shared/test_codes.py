"""The dual codebook: what goes in comes out, and what is wrong is named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from shared.codes import LINGUISTIC_PAD, duration_s, interleave, split, time_align
from shared.errors import UserError

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "decoder_small" / "io.safetensors"

linguistic_codes = st.lists(st.integers(0, 1023), max_size=60)
semantic_codes = st.lists(st.integers(0, 4095), max_size=90)


@given(linguistic_codes, semantic_codes)
def test_splitting_undoes_interleaving_up_to_the_last_whole_group(linguistic, semantic):
    mixed = interleave(np.array(linguistic, int), np.array(semantic, int))
    groups = min(len(linguistic) // 2, len(semantic) // 3)
    low, high = split(mixed)
    assert len(mixed) == groups * 5
    assert low.tolist() == linguistic[: groups * 2]
    assert high.tolist() == semantic[: groups * 3]
    assert np.array_equal(interleave(low, high), mixed)


@given(linguistic_codes, semantic_codes)
def test_time_alignment_loses_nothing(linguistic, semantic):
    mixed = interleave(np.array(linguistic, int), np.array(semantic, int))
    groups = time_align(torch.from_numpy(mixed)).view(-1, 3, 2)
    assert (groups[:, 2, 0] == LINGUISTIC_PAD).all()
    again = torch.cat([groups[:, :2, 0], groups[:, :, 1] - 1], dim=1).flatten()
    assert again.tolist() == mixed.tolist()


def test_time_alignment_is_the_official_one():
    golden = load_file(GOLDEN)
    assert torch.equal(time_align(golden["tokens"]), golden["tokens_time_aligned"])


def test_groups_are_ordered_and_offset():
    assert interleave([1, 2, 9], [0, 1, 2, 3]).tolist() == [1, 2, 1024, 1025, 1026]
    assert duration_s(np.arange(12)) == pytest.approx(0.24)


@pytest.mark.parametrize(
    ("mixed", "message"),
    [
        ([1, 2, 1024, 1025], "from position 0"),
        ([1, 2, 1024, 1025, 1026, 1], "from position 5"),
        ([1, 2, 1024, 7, 1026], "position 3 holds 7 .* place 3"),
        ([1, 1024, 1024, 1025, 1026], "position 1 holds 1024"),
        ([1, 2, 1024, 1025, 5120], "position 4 holds 5120"),
        ([-1, 2, 1024, 1025, 1026], "position 0 holds -1"),
        ([[1, 2]], "one dimension"),
        ([0.5], "integers"),
    ],
)
def test_a_broken_sequence_is_refused_with_its_position(mixed, message):
    with pytest.raises(UserError, match=message):
        split(mixed)


def test_codes_out_of_range_are_refused():
    with pytest.raises(UserError, match="linguistic codes: position 1 holds 1024"):
        interleave([0, 1024], [0, 0, 0])
    with pytest.raises(UserError, match="semantic codes: position 2 holds 4096"):
        interleave([0, 1], [0, 0, 4096])


def test_time_alignment_takes_whole_groups_only():
    with pytest.raises(ValueError, match="5"):
        time_align(torch.zeros(7, dtype=torch.long))
