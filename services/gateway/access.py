"""Who calls and how much they may: API keys, request rates, open jobs, and whether the system has room.

Keys are kept as SHA-256 digests and compared in constant time. Rates and open jobs are counted in the job store, the
backlog in the bus, so all three hold across gateways.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
from dataclasses import dataclass
from pathlib import Path

from anyio import CapacityLimiter
from pydantic import BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError

from services.gateway.backend import Backend
from services.gateway.metrics import Metrics
from services.gateway.problems import Forbidden, TooMuch, Unauthorized
from services.gateway.settings import GatewaySettings
from shared.errors import UserError
from shared.schemas import Lane, topic_for

ANYBODY = "local"
BACKLOG_RETRY_S = 5.0


class ApiKey(BaseModel):
    """One key of the keys file. `id` names its owner in jobs and voices; the key itself is not kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of the key, in hexadecimal.")
    requests_per_minute: int | None = Field(default=None, ge=1)
    open_jobs_max: int | None = Field(default=None, ge=1)
    lanes: tuple[Lane, ...] = ("interactive", "batch")
    webhook_secret: SecretStr | None = None


@dataclass(frozen=True)
class Principal:
    """Whoever makes a call, with their limits."""

    id: str
    requests_per_minute: int
    open_jobs_max: int
    lanes: tuple[Lane, ...]
    webhook_secret: SecretStr | None


class Keys:
    """The API keys. Without a keys file everybody is one and the same user."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._keys = None if settings.api_keys_file is None else _read(settings.api_keys_file)

    def principal(self, presented: str | None) -> Principal:
        """The owner of a key. Raises Unauthorized."""
        if self._keys is None:
            return self._principal(ApiKey(id=ANYBODY, sha256="0" * 64))
        digest = hashlib.sha256((presented or "").encode()).hexdigest()
        found = [key for key in self._keys if hmac.compare_digest(key.sha256, digest)]  # always compares with all
        if not presented or not found:
            raise Unauthorized(
                "This needs an API key." if not presented else "The API key is not known.",
                "Send it as `Authorization: Bearer KEY`.",
            )
        return self._principal(found[0])

    def webhook_secret(self, owner: str) -> SecretStr | None:
        """The secret that signs the webhooks of an owner's jobs; None where there is none."""
        own = [key.webhook_secret for key in self._keys or () if key.id == owner]
        return (own[0] if own else None) or self._settings.webhook_secret

    def _principal(self, key: ApiKey) -> Principal:
        settings = self._settings
        return Principal(
            key.id,
            key.requests_per_minute or settings.requests_per_minute,
            key.open_jobs_max or settings.open_jobs_max,
            key.lanes,
            key.webhook_secret or settings.webhook_secret,
        )


def _read(path: Path) -> tuple[ApiKey, ...]:
    try:
        keys = TypeAdapter(tuple[ApiKey, ...]).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(
            f"The keys file {path} cannot be used: {error}", "docs/api.md shows its form.", "keys_invalid"
        ) from error
    if len({key.id for key in keys}) != len(keys) or any(key.id == ANYBODY for key in keys):
        raise UserError(
            f"An id in {path} is there twice, or is {ANYBODY!r}.", "Give every key its own.", "keys_invalid"
        )
    return keys


class Admission:
    """Lets work in, or refuses it with the time after which to come again."""

    def __init__(self, backend: Backend, settings: GatewaySettings, metrics: Metrics) -> None:
        self._backend = backend
        self._metrics = metrics
        self._limits: dict[Lane, int] = {
            "interactive": settings.backlog_interactive_max,
            "batch": settings.backlog_batch_max,
        }
        self._lock = threading.Lock()
        self._backlogs: dict[Lane, int] = dict.fromkeys(self._limits, 0)

    def call(self, principal: Principal) -> None:
        """Count one call that costs work. Raises TooMuch above the principal's rate, with bursts of one minute.

        Raises JobStoreUnavailable where nobody can tell.
        """
        wait_s = self._backend.quota.take(principal.id, principal.requests_per_minute)
        if wait_s > 0.0:
            self._metrics.refused.labels("rate").inc()
            raise TooMuch(
                f"More than {principal.requests_per_minute} calls in a minute.", "Slow down.", "rate_limited",
                retry_after_s=wait_s,
            )  # fmt: skip

    def jobs(self, principal: Principal, lane: Lane, count: int = 1) -> None:
        """Let `count` new jobs in. Raises Forbidden, or TooMuch by the lane's backlog.

        The principal's open jobs are counted as each is stored.
        """
        if lane not in principal.lanes:
            raise Forbidden(f"This key may not use the {lane} lane.", f"It may use {', '.join(principal.lanes)}.")
        if self.backlog(lane) + count > self._limits[lane]:
            self._metrics.refused.labels("backlog").inc()
            raise TooMuch(
                f"The {lane} lane has {self.backlog(lane)} steps waiting, as many as it takes.",
                "Come again later, or use the batch lane." if lane == "interactive" else "Come again later.",
                "overloaded",
                retry_after_s=BACKLOG_RETRY_S,
            )
        with self._lock:
            self._backlogs[lane] += count

    def batch(self, principal: Principal, count: int) -> None:
        """Raise TooMuch where so many jobs at once would pass the principal's limit, before the first is stored."""
        open_jobs, limit = self._backend.jobs.count_open(principal.id), principal.open_jobs_max
        if open_jobs + count > limit:
            raise self.too_many(
                f"{open_jobs} of your jobs have not ended; {count} more would pass the limit of {limit}."
            )

    def too_many(self, message: str) -> TooMuch:
        """The refusal for a principal with too many open jobs, counted."""
        self._metrics.refused.labels("open_jobs").inc()
        return TooMuch(message, "Wait for some to end, or cancel them.", "too_many_jobs", retry_after_s=BACKLOG_RETRY_S)

    def backlog(self, lane: Lane) -> int:
        """Steps of a lane that waited or ran at the last look, and the jobs let in since then."""
        with self._lock:
            return self._backlogs[lane]

    def look(self) -> None:
        """Read the backlogs from the bus. Raises BusUnavailable: what was last known stays then."""
        for lane in self._limits:
            groups = self._backend.groups
            count = sum(self._backend.bus.backlog(topic_for(kind, lane), group) for kind, group in groups.items())
            with self._lock:
                self._backlogs[lane] = count
            self._metrics.backlog.labels(lane).set(count)


class Listeners:
    """A bounded number of places for those who wait."""

    def __init__(self, most: int) -> None:
        self.limiter = CapacityLimiter(most)
        self._most = most
        self.count = 0

    def check(self) -> None:
        """Raise TooMuch when no place is free."""
        if self.count >= self._most:
            raise TooMuch(f"{self._most} callers listen already.", "Poll the job instead.", "too_many_listeners",
                          retry_after_s=BACKLOG_RETRY_S)  # fmt: skip

    def __enter__(self) -> None:
        self.check()
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self.count -= 1
