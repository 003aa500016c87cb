"""Smaller weights stay near the exact ones, and int8 ones give a row the same bits in any batch."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from shared.models.quantize import HalfLinear, Int8Linear, output_rows, quantize_weight, replace_linears
from shared.models.step1 import Step1, Step1Config

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "step1_small"


def test_a_quantised_weight_is_within_half_a_step_of_the_exact_one() -> None:
    weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    quantized, scales = quantize_weight(weight)
    assert ((quantized * scales[:, None] - weight).abs() <= scales[:, None] * 0.5001).all()


def test_a_channel_of_zeros_stays_zero() -> None:
    quantized, scales = quantize_weight(torch.zeros(3, 8))
    assert (quantized * scales[:, None]).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_linear_layer_agrees_with_its_exact_twin(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    exact = nn.Linear(64, 48, bias=False)
    x = torch.randn(3, 200, 64)
    for rows in (1, 7, 200):
        out = Int8Linear.of(exact.to(dtype))(x[:, :rows].to(dtype)).float()
        expected = exact.float()(x[:, :rows])
        assert out.shape == expected.shape
        assert (out - expected).norm() / expected.norm() < 0.02


def test_a_row_has_the_same_bits_in_batches_of_every_size() -> None:
    layer = Int8Linear.of(nn.Linear(256, 96, bias=False).to(torch.bfloat16))
    x = torch.randn(16, 256).to(torch.bfloat16)
    whole = layer(x)
    assert all(torch.equal(layer(x[:n]), whole[:n]) for n in range(1, 17))


def test_chosen_output_rows_are_those_of_the_whole_layer() -> None:
    layer, ids = nn.Linear(32, 50, bias=False), torch.tensor([3, 40, 7])
    x = torch.randn(4, 32)
    torch.testing.assert_close(output_rows(layer, ids)(x), layer(x)[:, ids])
    packed = Int8Linear.of(layer)
    torch.testing.assert_close(output_rows(packed, ids)(x), packed(x)[:, ids])
    halves = HalfLinear.of(layer)
    torch.testing.assert_close(output_rows(halves, ids)(x), halves(x)[:, ids])
    with pytest.raises(TypeError, match="linear layer"):
        output_rows(nn.ReLU(), ids)
    with pytest.raises(ValueError, match="without bias"):
        HalfLinear.of(nn.Linear(8, 8))


def test_float16_weights_keep_all_that_bfloat16_ones_have() -> None:
    torch.manual_seed(0)
    exact = nn.Linear(64, 48, bias=False).to(torch.bfloat16).float()
    packed = HalfLinear.of(exact)
    assert torch.equal(packed.weight, exact.weight)
    x = torch.randn(3, 200, 64)
    for rows in (1, 7, 200):
        torch.testing.assert_close(packed(x[:, :rows]), exact(x[:, :rows]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(HalfLinear.joined(packed, packed)(x), packed(x).repeat(1, 1, 2))
    with pytest.raises(TypeError, match="float16 weights can be joined"):
        HalfLinear.joined(packed, exact)
    assert HalfLinear.works(torch.float32, "cpu")
    assert not HalfLinear.works(torch.bfloat16, "cpu")
    assert not HalfLinear.works(torch.float32, "cuda")


def test_step1_in_int8_stays_near_the_golden_logits() -> None:
    model = Step1(Step1Config.from_dict(json.loads((GOLDEN / "config.json").read_text())))
    model.load_state_dict(load_file(GOLDEN / "model.safetensors"))
    golden = load_file(GOLDEN / "io.safetensors")
    small = replace_linears(copy.deepcopy(model), Int8Linear.of)
    with torch.no_grad():
        _, logits = small(golden["input_ids"])
    assert (logits - golden["logits"]).norm() / golden["logits"].norm() < 0.05
