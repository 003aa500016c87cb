"""The numbers of PPO: those that arXiv 2511.03601 states, and a reason beside each that it leaves open."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.trainer.core.objectives import Placement
from services.trainer.core.settings import LoopConfig
from shared.errors import UserError


@dataclass(frozen=True)
class Guards:
    """When a run stops by itself. KL in nats per token (k3), lengths as factors of the first rollouts' mean.

    `gap_checks`: so many judge checks in a row where the reward rose and the judge's score fell is reward hacking.
    """

    kl: float = 0.5
    shortest: float = 0.5
    longest: float = 1.8
    reward: float = 8.0
    gap_checks: int = 4
    gap: float = 0.02


@dataclass(frozen=True)
class PpoConfig:
    """A step is one batch of rollouts and the updates on it.

    Stated by the paper: critic_warmup 80 steps before the actor moves, both rates 1e-6 falling to 2e-7 along a cosine,
    clip 0.2, KL 0.05 per token. Left open there:

    - gamma 1: an answer is short and its reward is about the whole of it. lam 0.95: the usual trade of bias against
      variance; at 1 a token's advantage carries the noise of all later ones.
    - prompts_per_step x samples_per_prompt answers a step: whitening wants some dozens. epochs 2 over minibatches of
      `minibatch` answers: two passes use most of a rollout while ratios stay inside the clip; `micro` of them are on
      the device at once.
    - value_clip 0.2 like the policy's. entropy 0: the KL term already keeps the policy wide.
    - temperature 1: answers come from the policy itself, so that log-probabilities need no correction.
    - max_stretch, extra_groups: an answer may be so many times as long as its source, and some groups more.
    - unfinished_penalty: taken from the reward of an answer that ran into that limit.
    - max_staleness: rollouts of weights more than so many versions old are dropped.
    """

    steps: int = 400
    critic_warmup: int = 80
    clip: float = 0.2
    kl_beta: float = 0.05
    gamma: float = 1.0
    lam: float = 0.95
    value_clip: float | None = 0.2
    entropy: float = 0.0
    placement: Placement = "spread"
    prompts_per_step: int = 16
    samples_per_prompt: int = 4
    epochs: int = 2
    minibatch: int = 32
    micro: int = 8
    temperature: float = 1.0
    max_stretch: float = 2.0
    extra_groups: int = 8
    unfinished_penalty: float = 1.0
    max_staleness: int = 1
    critic_lr: float = 1e-6
    critic_final_lr: float = 2e-7
    watch_every: int = 20
    guards: Guards = field(default_factory=Guards)
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(lr=1e-6, final_lr=2e-7))

    def __post_init__(self) -> None:
        rules = {
            "steps must be at least 1": self.steps >= 1,
            "clip must lie in (0, 1)": 0 < self.clip < 1,
            "gamma and lam must lie in [0, 1]": 0 <= self.gamma <= 1 and 0 <= self.lam <= 1,
            "temperature must be positive": self.temperature > 0,
            "kl_beta, entropy and max_staleness must not be negative":
                min(self.kl_beta, self.entropy, self.max_staleness) >= 0,
            "batch sizes must be at least 1":
                min(self.prompts_per_step, self.samples_per_prompt, self.epochs, self.minibatch, self.micro) >= 1,
        }  # fmt: skip
        for rule, holds in rules.items():
            if not holds:
                raise UserError(f"PPO config: {rule}.", code="invalid_training")
