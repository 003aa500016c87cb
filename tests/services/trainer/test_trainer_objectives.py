"""The objectives against values worked out by hand."""

import math

import pytest
import torch

from services.trainer.core.objectives import (
    aggregate_scores,
    answer_loss,
    bradley_terry,
    calibration_error,
    explained_variance,
    gae,
    grammar_only,
    kl_estimate,
    masked_mean,
    pair_accuracy,
    policy_loss,
    shaped_rewards,
    value_loss,
    whiten,
)
from services.trainer.core.schedules import cosine, set_lr


def close(value: torch.Tensor, expected: object) -> None:
    torch.testing.assert_close(value, torch.as_tensor(expected, dtype=value.dtype), rtol=1e-5, atol=1e-6)


def test_bradley_terry_and_its_gradient_are_those_of_the_logistic() -> None:
    chosen = torch.tensor([1.0, 0.0], requires_grad=True)
    rejected = torch.tensor([0.0, 2.0], requires_grad=True)
    loss = bradley_terry(chosen, rejected)
    close(loss, (math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2)  # 0.31326, 2.12693
    loss.backward()
    weights = torch.tensor([1 / (1 + math.e), 1 / (1 + math.exp(-2))]) / 2
    close(chosen.grad, -weights)
    close(rejected.grad, weights)


def test_bradley_terry_with_a_margin_wants_that_much_more() -> None:
    close(bradley_terry(torch.tensor([3.0]), torch.tensor([1.0]), 2.0), math.log(2))


def test_scores_aggregate_over_the_mask_only() -> None:
    scores = torch.tensor([[1.0, 2.0, 9.0], [4.0, 7.0, 9.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    close(aggregate_scores(scores, mask, "mean"), [1.5, 4.0])
    close(aggregate_scores(scores, mask, "sum"), [3.0, 4.0])
    close(aggregate_scores(scores, mask, "last"), [2.0, 4.0])


def test_an_empty_row_scores_nothing() -> None:
    scores, mask = torch.ones(1, 3), torch.zeros(1, 3)
    for how in ("mean", "sum", "last"):
        close(aggregate_scores(scores, mask, how), [0.0])


def test_pair_accuracy_counts_a_tie_half() -> None:
    close(pair_accuracy(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0])), 0.5)


def test_calibration_error_is_the_gap_of_each_bin_by_its_share() -> None:
    probability = torch.tensor([0.95, 0.95, 0.55, 0.55])
    correct = torch.tensor([1, 1, 1, 0])
    close(calibration_error(probability, correct), 0.5 * 0.05 + 0.5 * 0.05)


def test_gae_equals_the_hand_worked_recursion() -> None:
    rewards = torch.tensor([[1.0, 0.0, 2.0]])
    values = torch.tensor([[0.5, 1.0, 1.5]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3), gamma=0.9, lam=0.8)
    # deltas: 1 + .9 - .5 = 1.4;  0 + 1.35 - 1 = .35;  2 - 1.5 = .5
    last, middle = 0.5, 0.35 + 0.72 * 0.5
    first = 1.4 + 0.72 * middle
    close(advantages, [[first, middle, last]])
    close(returns, [[first + 0.5, middle + 1.0, last + 1.5]])


def test_gae_ends_where_the_mask_ends() -> None:
    rewards = torch.tensor([[1.0, 2.0, 5.0, 5.0]])
    values = torch.tensor([[0.5, 0.5, 9.0, 9.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    close(advantages, [[2.5, 1.5, 0.0, 0.0]])
    close(returns, [[3.0, 2.0, 0.0, 0.0]])


def test_gae_with_lambda_one_is_return_minus_value() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(3, 7, generator=generator) for _ in range(2))
    advantages, _ = gae(rewards, values, torch.ones(3, 7), gamma=1.0, lam=1.0)
    close(advantages, rewards.flip(1).cumsum(1).flip(1) - values)


def test_whitening_leaves_mean_zero_and_variance_one_inside_the_mask() -> None:
    x = torch.tensor([[1.0, 2.0, 100.0], [3.0, -50.0, 4.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    spread = math.sqrt(5 / 3)  # of 1 2 3 4, unbiased
    close(whiten(x, mask), [[-1.5 / spread, -0.5 / spread, 0.0], [0.5 / spread, 0.0, 1.5 / spread]])
    kept = whiten(x, mask, keep_mean=True)
    close(masked_mean(kept, mask), 2.5)


def test_the_clipped_objective_binds_only_where_it_would_gain() -> None:
    old = torch.zeros(1, 4)
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    mask = torch.ones(1, 4)
    result = policy_loss(ratios.log(), old, advantages, mask, clip=0.2)
    # min(1.5, 1.2) = 1.2; min(-1.5, -1.2) = -1.5; min(.5, .8) = .5; min(-.5, -.8) = -.8
    close(result.loss, -(1.2 - 1.5 + 0.5 - 0.8) / 4)
    close(result.clipped, 0.5)
    close(result.ratio, 1.0)


def test_a_clipped_token_gives_the_policy_no_gradient() -> None:
    log_probs = torch.tensor([[math.log(1.5), math.log(1.1)]], requires_grad=True)
    policy_loss(log_probs, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2), clip=0.2).loss.backward()
    close(log_probs.grad, [[0.0, -1.1 / 2]])


def test_value_clipping_takes_the_larger_error() -> None:
    values, old = torch.tensor([[2.0, 1.1]]), torch.tensor([[1.0, 1.0]])
    returns, mask = torch.tensor([[2.0, 2.0]]), torch.ones(1, 2)
    # clipped: 1.2 -> .64 against 0; 1.1 -> .81 both
    close(value_loss(values, old, returns, mask, clip=0.2), 0.5 * (0.64 + 0.81) / 2)
    close(value_loss(values, old, returns, mask, clip=None), 0.5 * 0.81 / 2)


def test_kl_estimates_agree_with_the_true_divergence_on_average() -> None:
    p, q = torch.tensor([0.7, 0.3]), torch.tensor([0.4, 0.6])
    true = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):
        close((p * kl_estimate(p.log(), q.log(), kind)).sum(), true)
    close(kl_estimate(p.log(), q.log(), "k2"), 0.5 * (p / q).log() ** 2)
    assert (kl_estimate(p.log(), q.log(), "k3") >= 0).all()


def test_shaped_rewards_sum_to_score_minus_penalty_wherever_the_score_is_placed() -> None:
    scores = torch.tensor([[1.0, 3.0, 7.0, 7.0]])
    kl = torch.tensor([[0.2, -0.1, 0.4, 5.0]])
    audio = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])  # with the end token
    spread = shaped_rewards(scores, audio, kl, mask, 0.05, "mean", "spread")
    close(spread, [[0.5 - 0.01, 1.5 + 0.005, -0.02, 0.0]])
    end = shaped_rewards(scores, audio, kl, mask, 0.05, "mean", "end")
    close(end, [[-0.01, 0.005, 2.0 - 0.02, 0.0]])
    close(spread.sum(), end.sum())


def test_explained_variance_of_a_perfect_and_of_a_constant_critic() -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3)
    close(explained_variance(returns, returns, mask), 1.0)
    close(explained_variance(torch.full((1, 3), 2.0), returns, mask), 0.0)


def test_under_the_grammar_a_code_competes_with_its_kind_alone() -> None:
    offset, eos = 10, 3
    wanted = torch.tensor([offset + 4, offset + 1024 + 9, eos, 5])
    logits = grammar_only(torch.zeros(4, offset + 5120), wanted, offset, eos)
    assert torch.isfinite(logits).sum(-1).tolist() == [1025, 4096, 1025, offset + 5120]
    assert torch.isfinite(logits[torch.arange(4), wanted]).all()
    loss = answer_loss(logits[:2], wanted[:2], torch.ones(2), 2.0)
    assert math.isclose(float(loss), (math.log(1025) + math.log(4096)) / 2, rel_tol=1e-5)


def test_answer_loss_weighs_every_token_alike_however_batches_are_cut() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, wanted = torch.randn(6, 5, generator=generator), torch.tensor([0, 1, 2, 3, 4, 0])
    weights = torch.ones(6)
    whole = answer_loss(logits, wanted, weights, 6.0)
    parts = answer_loss(logits[:2], wanted[:2], weights[:2], 6.0) + answer_loss(
        logits[2:], wanted[2:], weights[2:], 6.0
    )
    close(whole, parts.item())


@pytest.mark.parametrize(("step", "rate"), [(0, 2.5e-6), (3, 1e-5), (4, 1e-5), (54, 5.5e-6), (104, 1e-6), (999, 1e-6)])
def test_the_cosine_at_given_steps(step: int, rate: float) -> None:
    assert cosine(step, total=105, peak=1e-5, final=1e-6, warmup=4) == pytest.approx(rate)


def test_a_schedule_of_one_step_is_its_peak() -> None:
    assert cosine(0, total=1, peak=3.0, final=1.0) == 3.0


def test_set_lr_reaches_every_group() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=1.0)
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
