"""What stops a PPO run that goes wrong: KL, length or reward running away, or a reward that the judge does not share.

Knows numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from services.trainer.ppo.config import Guards
from shared.errors import EditxError


class Runaway(EditxError):
    """Training was stopped by a guard; the last saved state is from before or at the stop."""

    default_code = "training_runaway"


@dataclass
class Watch:
    """Follows a run. Its state is part of the saved run."""

    guards: Guards
    first_length: float | None = None
    checks: list[dict[str, float]] = field(default_factory=list)

    def step(self, step: int, kl: float, length: float, reward: float) -> None:
        """Look at one step: k3 KL per token, mean audio tokens per answer, mean reward. Raises Runaway."""
        if self.first_length is None:
            self.first_length = length
        ratio, limits = length / max(self.first_length, 1e-9), self.guards
        if kl > limits.kl:
            raise Runaway(f"Step {step}: the policy is {kl:.3f} nats per token from the reference, limit {limits.kl}.",
                          "Lower the learning rate, or raise kl_beta.")  # fmt: skip
        if not limits.shortest <= ratio <= limits.longest:
            raise Runaway(f"Step {step}: answers are {ratio:.2f} times as long as at first, limits {limits.shortest} "
                          f"and {limits.longest}.", "The reward model favours a length: train it on pairs of equal "
                          "length, or check unfinished_penalty.")  # fmt: skip
        if abs(reward) > limits.reward:
            raise Runaway(f"Step {step}: the mean reward is {reward:.2f} deviations, limit {limits.reward}.",
                          "The policy left what the reward model knows: raise kl_beta or stop earlier.")  # fmt: skip

    def check(self, step: int, reward: float, judge: float) -> float:
        """Note a held-out check and return the divergence. Raises Runaway after `gap_checks` in a row above `gap`."""
        self.checks.append({"step": step, "reward": reward, "judge": judge})
        gap = divergence(self.checks)
        self.checks[-1]["divergence"] = gap
        recent = self.checks[-self.guards.gap_checks :]
        if len(recent) == self.guards.gap_checks and all(one["divergence"] > self.guards.gap for one in recent):
            raise Runaway(f"Step {step}: the reward rises while the judge's score fell by {gap:.3f} (reward hacking).",
                          "Take an earlier state; train the reward model on the policy's newer answers.")  # fmt: skip
        return gap

    def state_dict(self) -> dict[str, Any]:
        return {"first_length": self.first_length, "checks": self.checks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first_length, self.checks = state["first_length"], state["checks"]


def divergence(checks: list[dict[str, float]]) -> float:
    """How far the judge is below its best so far, if the reward is above its first value; else 0."""
    if len(checks) < 2 or checks[-1]["reward"] <= checks[0]["reward"]:
        return 0.0
    return max(one["judge"] for one in checks) - checks[-1]["judge"]
