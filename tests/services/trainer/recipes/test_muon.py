"""The optimizer for matrices: torch's own rule, in the precision that the device is fast at."""

import pytest
import torch
from torch import Tensor, nn

from services.trainer.recipes.nano.muon import Muon, orthogonal


def matrices() -> list[nn.Parameter]:
    drawn = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=drawn)) for size in ((24, 40), (40, 24), (16, 16))]


def stepped(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int = 3) -> list[Tensor]:
    """How far each parameter moved."""
    before = [parameter.detach().clone() for parameter in parameters]
    drawn = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=drawn)
        optimizer.step()
    return [parameter.detach() - old for parameter, old in zip(parameters, before, strict=True)]


def test_it_moves_as_torchs_muon_does_but_for_rounding() -> None:
    own, reference = matrices(), matrices()
    moved = stepped(own, Muon(own, 0.02, weight_decay=0.01))
    expected = stepped(reference, torch.optim.Muon(reference, 0.02, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    for one, other in zip(moved, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.03


def test_a_state_of_torchs_muon_goes_on() -> None:
    reference, own = matrices(), matrices()
    theirs = torch.optim.Muon(reference, 0.02, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    stepped(reference, theirs, 1)
    ours = Muon(own, 0.02, weight_decay=0.01)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.state[own[0]]["momentum_buffer"], theirs.state[reference[0]]["momentum_buffer"])
    stepped(own, ours, 1)


@pytest.mark.parametrize("size", [(12, 30), (30, 12)])
def test_singular_values_come_near_one(size: tuple[int, int]) -> None:
    matrix = torch.randn(size, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonal(matrix, torch.float32))
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
    assert not orthogonal(torch.zeros(size), torch.float32).any()
