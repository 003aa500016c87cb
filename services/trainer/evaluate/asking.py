"""Which judge a name stands for: a file of the acoustic judge, or a model behind an API with its rate and budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.trainer.evaluate.acoustic import AcousticJudge
from services.trainer.evaluate.remote import Api, HttpJudge, Judge
from services.trainer.evaluate.runner import OfflineJudge
from shared.errors import UserError


@dataclass(frozen=True)
class Cost:
    """What asking an API may take: calls in a minute, the cost of one, and of all (None: no limit)."""

    calls_per_minute: float = 60.0
    per_call: float = 0.0
    budget: float | None = None


def open_judge(name: str, cache: Path, *, url: str = "", key: str = "", cost: Cost | None = None) -> Judge:
    """The judge of "FILE", "gemini:MODEL" or "openai:MODEL". Raises UserError where something is missing."""
    kind, separator, model = name.partition(":")
    if not separator:
        return OfflineJudge(AcousticJudge.load(Path(name)))
    if not url or not key:
        raise UserError("A remote judge needs an address and a key.", "Set EDITX_JUDGE_URL and EDITX_JUDGE_KEY.")
    limits = cost or Cost()
    budget = float("inf") if limits.budget is None else limits.budget
    api = Api(kind, model, key, url, limits.calls_per_minute, limits.per_call, budget)
    return HttpJudge(api, cache)
