"""Tells a job's owner that it has ended, after Standard Webhooks 1.0: signed, thin, at least once, with retries.

What is to be told lies in the artifact store from before the job is accepted until it was told, so a gateway that dies
loses nothing: another one takes over after a while. Receivers tell repeated messages by their webhook-id.
"""

from __future__ import annotations

import heapq
import json
import logging
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import httpx
from pydantic import SecretStr
from standardwebhooks.webhooks import Webhook

from services.gateway.access import Keys
from services.gateway.addresses import RefusedAddress, resolve
from services.gateway.metrics import Metrics
from services.gateway.settings import GatewaySettings
from shared import outbox
from shared.errors import EditxError, UserError
from shared.jobs.port import JobNotFound, JobStore
from shared.outbox import PREFIX, outbox_key
from shared.schemas import Job
from shared.schemas.exchange import Result
from shared.store.port import ArtifactNotFound, ArtifactStore

log = logging.getLogger(__name__)
SENDERS = 4
TICK_S = 0.25
LOOK_MIN_S, LOOK_MAX_S = 0.25, 5.0
SCAN_EVERY_S = 60.0
TAKEOVER_S = 120.0


class Webhooks:
    """The outbox of one gateway. `start` begins to send."""

    def __init__(
        self, store: ArtifactStore, jobs: JobStore, keys: Keys, settings: GatewaySettings, metrics: Metrics
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._keys = keys
        self._settings = settings
        self._metrics = metrics
        self._due: list[tuple[float, str]] = []  # (monotonic seconds, job id)
        self._watched: dict[str, float] = {}  # job id -> seconds between looks
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(SENDERS, thread_name_prefix="webhook")
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)
        self._client = httpx.Client(
            follow_redirects=False, trust_env=False, timeout=settings.webhook_timeout_s,
            headers={"user-agent": "editx-webhook", "content-type": "application/json"},
        )  # fmt: skip

    def check(self, url: str, secret: SecretStr | None) -> None:
        """Raise UserError where a webhook could not be sent: no secret to sign with, or an address that is refused."""
        if secret is None:
            raise UserError("No webhook secret is set for this key.", "Set EDITX_WEBHOOK_SECRET.", "webhook_no_secret")
        resolve(url, self._settings.webhook_allowed_hosts)

    def remember(self, job_id: str) -> None:
        """Keep, until it was told, that the job's end is to be told. Before the job is accepted."""
        outbox.remember(self._store, job_id, 0, self._jobs.now())

    def watch(self, job_id: str) -> None:
        """Look at the job from now on."""
        with self._lock:
            self._watched[job_id] = LOOK_MIN_S
            heapq.heappush(self._due, (time.monotonic() + LOOK_MIN_S, job_id))

    def heard(self, result: Result) -> None:
        """A job has ended. One that came over the bus no gateway watched: whichever hears of its end tells it."""
        if result.submission_id and result.job_id and result.job_id not in self._watched:
            self.watch(result.job_id)

    def forget(self, job_id: str) -> None:
        """There is nothing to tell, or no more."""
        self._store.delete(outbox_key(job_id))
        with self._lock:
            self._watched.pop(job_id, None)

    def start(self) -> None:
        """Begin sending, with what earlier gateways left behind."""
        self._thread.start()

    def stop(self) -> None:
        """Stop sending; what was not told stays in the store."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _run(self) -> None:
        scan_at = 0.0
        while not self._stop.wait(TICK_S):
            now = time.monotonic()
            try:
                if now >= scan_at:
                    scan_at = now + SCAN_EVERY_S
                    self._scan()
            except EditxError as error:
                log.warning("the outbox was not read: %s", error)
            except Exception:
                log.exception("the outbox was not read")
            for job_id in self._take(now):
                self._pool.submit(self._look, job_id)

    def _take(self, now: float) -> list[str]:
        taken = []
        with self._lock:
            while self._due and self._due[0][0] <= now:
                taken.append(heapq.heappop(self._due)[1])
        return taken

    def _scan(self) -> None:
        """Take over what another gateway was to tell and did not."""
        now = self._jobs.now()
        for info in self._store.list(PREFIX):
            job_id = info.key.removeprefix(PREFIX).removesuffix(".json")
            if job_id in self._watched:
                continue
            try:
                _, next_at = outbox.recall(self._store, job_id)
                job = self._jobs.get(job_id)
            except ArtifactNotFound:
                continue
            except JobNotFound:
                if info.modified_at + TAKEOVER_S < now:
                    self._store.delete(info.key)
                continue
            if job.finished_at is not None and max(job.finished_at, next_at) + TAKEOVER_S < now:
                self.watch(job_id)

    def _look(self, job_id: str) -> None:
        """See whether the job has ended, and tell its owner if so."""
        try:
            job = self._jobs.get(job_id)
            if not job.is_terminal:
                with self._lock:
                    wait_s = self._watched[job_id]
                    self._watched[job_id] = min(wait_s * 1.5, LOOK_MAX_S)
                self._again(job_id, wait_s)
                return
            if job.request.webhook_url is None:
                with self._lock:
                    self._watched.pop(job_id, None)
                return
            self._tell(job)
        except (JobNotFound, ArtifactNotFound):
            self.forget(job_id)
        except EditxError as error:
            log.warning("the webhook of %s waits: %s", job_id, error)
            self._again(job_id, LOOK_MAX_S)
        except Exception:
            log.exception("the webhook of %s was not sent", job_id)
            self._again(job_id, LOOK_MAX_S)

    def _tell(self, job: Job) -> None:
        attempts, _ = outbox.recall(self._store, job.id)
        outcome = self._send(job)
        self._metrics.webhooks.labels("sent" if outcome is None else "failed").inc()
        if outcome is None:
            log.info("the end of %s was told", job.id)
            self.forget(job.id)
            return
        waits = self._settings.webhook_retries_s
        if attempts >= len(waits):
            log.error("the webhook of %s is given up after %d attempts: %s", job.id, attempts + 1, outcome)
            self.forget(job.id)
            return
        wait_s = waits[attempts] * random.uniform(0.8, 1.2)
        log.warning("the webhook of %s failed, again in %.0f s: %s", job.id, wait_s, outcome)
        outbox.remember(self._store, job.id, attempts + 1, self._jobs.now() + wait_s)
        self._again(job.id, wait_s)

    def _send(self, job: Job) -> str | None:
        """One attempt: None where the receiver took it, else what went wrong."""
        secret = self._keys.webhook_secret(job.owner)
        if secret is None:
            return "no secret is set any more"
        identity, now = f"msg_{job.id}", datetime.now(UTC)
        body = json.dumps(payload(job, now), ensure_ascii=False)
        headers = {
            "webhook-id": identity,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Webhook(secret.get_secret_value()).sign(identity, now, body),
        }
        try:
            target = resolve(job.request.webhook_url or "", self._settings.webhook_allowed_hosts)
            headers["host"] = target.authority
            with self._client.stream(
                "POST", target.url, content=body.encode(), headers=headers, extensions={"sni_hostname": target.host}
            ) as answer:
                return None if answer.is_success else f"the receiver answered {answer.status_code}"
        except (RefusedAddress, httpx.HTTPError) as error:
            return f"{type(error).__name__}: {error}"

    def _again(self, job_id: str, wait_s: float) -> None:
        with self._lock:
            heapq.heappush(self._due, (time.monotonic() + wait_s, job_id))


def payload(job: Job, now: datetime) -> dict[str, object]:
    """What is told: that the job has ended and how. The rest is at GET /v1/jobs/{id}."""
    error = None if job.error is None else {"code": job.error.code, "message": job.error.message[:500]}
    return {
        "type": f"job.{job.state.value}",
        "timestamp": now.isoformat(),
        "data": {"id": job.id, "object": "audio.edit", "status": job.state.value, "error": error},
    }
