"""What the gateway works with: the ports and a few facts about the checkpoint.

`open_backend` is the composition of the hosted shape, by the URLs in the settings; the embedded shape is composed by
the command line. Nothing else in the gateway knows which adapters it got.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from services.gateway.settings import GatewaySettings
from shared.bus.port import Bus
from shared.checkpoints.layout import Checkpoint, Metadata
from shared.inference.port import Inference
from shared.jobs.port import JobStore
from shared.jobs.quota import MemoryQuota, Quota
from shared.prompts import TextTokenizer, Turn
from shared.schemas.route import StepKind
from shared.store.folder import FolderStore
from shared.store.port import ArtifactStore
from shared.sweeper import Sweeper
from shared.wiring import open_bus, open_inference, open_jobs, open_quota, open_store

ARTIFACTS_PATH = "/v1/artifacts"

Encode = Callable[[Sequence[Turn]], Sequence[int]]

WORKER_GROUPS: Mapping[StepKind, str] = {
    "tokenize": "editx-tokenizer",
    "generate": "editx-llm",
    "score": "editx-reward",
    "decode": "editx-decoder",
}
"""Consumer groups of the worker processes, whose backlog decides whether new work is let in."""


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """The ports, the checkpoint's facts and its chat encoder; `close` ends what the composition began."""

    bus: Bus
    store: ArtifactStore
    jobs: JobStore
    inference: Inference
    metadata: Metadata
    encode: Encode
    groups: Mapping[StepKind, str] = field(default_factory=lambda: WORKER_GROUPS)
    quota: Quota = field(default_factory=MemoryQuota)
    has_reward: bool = True
    close: Callable[[], None] = _nothing


def encoder(checkpoint: Checkpoint) -> Encode:
    """The chat encoder of a checkpoint; its tokenizer file is read when it is first needed."""

    @cache
    def tokenizer() -> TextTokenizer:
        return TextTokenizer.from_file(checkpoint.text_tokenizer_file)

    return lambda turns: tokenizer().encode_chat(turns)


def reachable(store: ArtifactStore, settings: GatewaySettings) -> ArtifactStore:
    """A folder store whose presigned URLs lead to this gateway, which serves them; any other store as it is."""
    if not isinstance(store, FolderStore):
        return store
    return FolderStore(store.root, base_url=f"{settings.public_url.rstrip('/')}{ARTIFACTS_PATH}")


def open_backend(settings: GatewaySettings) -> Backend:
    """Connect to the servers that the settings name. Raises EditxError where one is unknown or a package is missing."""
    checkpoint = Checkpoint.resolve(settings.checkpoint)
    bus, jobs, quota = open_bus(settings.bus_url), open_jobs(settings.jobs_url), open_quota(settings.jobs_url)
    store = reachable(open_store(settings.store_url), settings)
    inference = open_inference(settings.inference_url, {})
    sweeper = Sweeper(jobs, bus, store)
    if settings.sweep:
        sweeper.start()

    def close() -> None:
        sweeper.stop()
        inference.close()
        bus.close()
        jobs.close()
        quota.close()

    return Backend(
        bus,
        store,
        jobs,
        inference,
        checkpoint.metadata,
        encoder(checkpoint),
        quota=quota,
        has_reward=checkpoint.has_reward,
        close=close,
    )
