"""The objectives of post-training as pure functions of tensors: no model, no data, no device.

Where arXiv 2511.03601 states a number it is a default of the stage's config; where it states none (how token rewards
aggregate, the generalised advantage's constants) the choice is written at the function that makes it. Token tensors are
(B, T) with a mask of the same shape, 1 where a token counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.codes import AUDIO_VOCAB, LINGUISTIC_SIZE

Aggregate = Literal["mean", "sum", "last"]
KlEstimate = Literal["k1", "k2", "k3"]
Placement = Literal["spread", "end"]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the tokens of the mask, all rows together; 0 where the mask is empty."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def masked_mean_rows(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of each row over its own tokens, (B, T) -> (B,)."""
    return (x * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def whiten(x: Tensor, mask: Tensor, *, keep_mean: bool = False, eps: float = 1e-8) -> Tensor:
    """x with mean 0 and variance 1 over the tokens of the mask, 0 elsewhere. With `keep_mean` only the scale changes.

    The variance is the unbiased one; a single token comes out as 0.
    """
    count = mask.sum()
    mean = masked_mean(x, mask)
    variance = ((x - mean) ** 2 * mask).sum() / (count - 1).clamp(min=1)
    white = (x - mean) * torch.rsqrt(variance + eps)
    return (white + mean if keep_mean else white) * mask


def aggregate_scores(scores: Tensor, mask: Tensor, how: Aggregate = "mean") -> Tensor:
    """Scores per token (B, T) to a score per sequence (B,).

    The paper gives a reward per token and not how they become one. The mean is the default here: it does not grow with
    length, so a longer answer is not a better one by itself, and it lets every token carry 1/n of the reward.
    """
    if how == "sum":
        return (scores * mask).sum(-1)
    if how == "last":
        positions = torch.arange(scores.shape[-1], device=scores.device)
        last = (mask * positions).argmax(-1, keepdim=True)
        return scores.gather(-1, last).squeeze(-1) * (mask.sum(-1) > 0)
    return masked_mean_rows(scores, mask)


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected - margin), mean over pairs: (B,), (B,) -> ()."""
    return -F.logsigmoid(chosen - rejected - margin).mean()


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Share of pairs in the right order; a tie counts half."""
    return ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean()


def calibration_error(probability: Tensor, correct: Tensor, bins: int = 10) -> Tensor:
    """Expected calibration error of predicted probabilities (n,) of an event that came true (1) or not (0)."""
    error = probability.new_zeros(())
    edges = torch.linspace(0, 1, bins + 1, device=probability.device)
    place = torch.bucketize(probability, edges[1:-1])
    for index in range(bins):
        inside = place == index
        if inside.any():
            gap = probability[inside].mean() - correct[inside].float().mean()
            error = error + inside.float().mean() * gap.abs()
    return error


def kl_estimate(log_probs: Tensor, reference: Tensor, kind: KlEstimate = "k1") -> Tensor:
    """Estimate per token of KL(policy || reference) from tokens that the policy drew, same shape.

    k1 = log p - log q: unbiased, may be negative; the penalty inside a reward, as its expectation has the right
    gradient. k2 = (log p - log q)^2 / 2: biased, low variance. k3 = q/p - 1 + log p - log q: unbiased, never negative;
    for logs and guards.
    """
    ratio = log_probs - reference
    if kind == "k1":
        return ratio
    if kind == "k2":
        return 0.5 * ratio.square()
    return torch.expm1(-ratio) + ratio


def shaped_rewards(
    scores: Tensor,
    scored: Tensor,
    kl: Tensor,
    mask: Tensor,
    beta: float,
    how: Aggregate = "mean",
    place: Placement = "spread",
) -> Tensor:
    """Reward per token: the reward model's score minus beta x KL of that token, 0 off the mask.

    `scores` (B, T) are the reward model's, counted where `scored` is 1 (audio tokens; the end token has no score), of
    which `how` makes a score per sequence. "spread" gives every token its own part of it, and the parts sum to it;
    "end" gives all of it to the last token of the mask.
    """
    if place == "end" or how == "last":
        positions = torch.arange(mask.shape[-1], device=mask.device)
        last = F.one_hot((mask * positions).argmax(-1), mask.shape[-1]).to(scores.dtype) * (
            mask.sum(-1, keepdim=True) > 0
        )
        parts = last * aggregate_scores(scores, scored, how)[:, None]
    else:
        parts = scores * scored / (scored.sum(-1, keepdim=True).clamp(min=1) if how == "mean" else 1.0)
    return (parts - beta * kl) * mask


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns, (B, T) each (Schulman et al., arXiv 1506.02438).

    Tokens of a row are contiguous; the value after the last one is 0 since the sequence ends there. Advantages are
    constants for the policy: no gradient flows. Returns = advantages + values.
    """
    rewards, values = rewards.detach(), values.detach() * mask
    advantages = torch.zeros_like(rewards)
    carried = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(carried)
        delta = rewards[:, t] + gamma * following - values[:, t]
        carried = (delta + gamma * lam * carried) * mask[:, t]
        advantages[:, t] = carried
    return advantages, (advantages + values) * mask


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped objective to be minimised, the share of tokens where clipping bound, and the mean of the ratios."""

    loss: Tensor
    clipped: Tensor
    ratio: Tensor


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> PolicyLoss:
    """-min(r A, clip(r, 1 - clip, 1 + clip) A), mean over tokens (PPO, arXiv 1707.06347)."""
    ratio = torch.exp(log_probs - old_log_probs)
    free, bounded = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -masked_mean(torch.minimum(free, bounded), mask)
    with torch.no_grad():
        return PolicyLoss(loss, masked_mean((bounded < free).to(mask.dtype), mask), masked_mean(ratio, mask))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None) -> Tensor:
    """0.5 x the larger squared error of the value and of the value clipped to within `clip` of the old one."""
    error = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return 0.5 * masked_mean(error, mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the mask: 1 is a perfect critic, 0 one that knows the mean only."""
    used = mask > 0
    left, whole = (returns - values)[used].var(), returns[used].var()
    return 1 - left / whole.clamp(min=1e-8)


def rivals(offset: int, eos: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids that decoding lets compete for a place: linguistic codes with the end (1025,), semantic codes (4096,)."""
    codes = torch.arange(offset, offset + AUDIO_VOCAB, device=device)
    end = torch.tensor([eos], device=device)
    return torch.cat([codes[:LINGUISTIC_SIZE], end]), codes[LINGUISTIC_SIZE:]


def grammar_only(logits: Tensor, wanted: Tensor, offset: int, eos: int) -> Tensor:
    """Logits (n, V) with what decoding cannot put in a token's place at -inf, by the ids wanted there (n,).

    Codes compete with their `rivals`, text with everything.
    """
    linguistic, semantic = rivals(offset, eos, logits.device)
    allowed = torch.zeros(3, logits.shape[-1], dtype=torch.bool, device=logits.device)
    allowed[0], allowed[1, linguistic], allowed[2, semantic] = True, True, True
    kind = allowed[1, wanted].long() + 2 * allowed[2, wanted].long()
    return logits.masked_fill(~allowed[kind], -torch.inf)


def answer_loss(logits: Tensor, wanted: Tensor, weights: Tensor, total: Tensor | float) -> Tensor:
    """Weighted cross entropy of chosen positions: logits (n, V), ids (n,), weights (n,) -> sum / total.

    `total` is the weight of the whole optimiser step, so that gradient accumulation and several devices weigh every
    token alike, however tokens fall into batches.
    """
    entropy = F.cross_entropy(logits.float(), wanted, reduction="none")
    return (entropy * weights).sum() / total
