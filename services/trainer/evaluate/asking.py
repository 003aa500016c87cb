"""Which judge a name stands for: a file of the acoustic judge, or a model behind an API with its rate and budget.

A training takes what asking an API may cost from the environment, since its settings travel with the job.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.trainer.evaluate.acoustic import AcousticJudge
from services.trainer.evaluate.remote import API_KINDS, Api, HttpJudge, Judge
from services.trainer.evaluate.runner import OfflineJudge
from shared.errors import UserError


@dataclass(frozen=True)
class Cost:
    """What asking an API may take: calls in a minute, the cost of one, and of all (None: no limit)."""

    calls_per_minute: float = 60.0
    per_call: float = 0.0
    budget: float | None = None


class JudgeSettings(BaseSettings):
    """Where a training's judge listens and what it may cost, by environment variables that begin with EDITX_JUDGE_."""

    model_config = SettingsConfigDict(env_prefix="EDITX_JUDGE_", env_ignore_empty=True, frozen=True)

    url: str = ""
    key: SecretStr = SecretStr("")
    rate: float = 60.0
    cost: float = 0.0
    budget: float | None = None

    def open(self, name: str, cache: Path) -> Judge:
        """The judge of a name. Raises UserError as `open_judge` does."""
        cost = Cost(self.rate, self.cost, self.budget)
        return open_judge(name, cache, url=self.url, key=self.key.get_secret_value(), cost=cost)


def is_remote(name: str) -> bool:
    """Whether a name stands for a model behind an API rather than for a file."""
    return name.partition(":")[0] in API_KINDS


def open_judge(name: str, cache: Path, *, url: str = "", key: str = "", cost: Cost | None = None) -> Judge:
    """The judge of "FILE", "gemini:MODEL" or "openai:MODEL". Raises UserError where something is missing."""
    kind, _, model = name.partition(":")
    if not is_remote(name):
        return OfflineJudge(AcousticJudge.load(Path(name)))
    if not url or not key:
        raise UserError("A remote judge needs an address and a key.", "Set EDITX_JUDGE_URL and EDITX_JUDGE_KEY.")
    limits = cost or Cost()
    budget = float("inf") if limits.budget is None else limits.budget
    api = Api(kind, model, key, url, limits.calls_per_minute, limits.per_call, budget)
    return HttpJudge(api, cache)
