"""The topics of the bus, the groups that read them, and what a bucket lets expire: what servers are set up by.

Knows names and numbers only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shared.schemas.exchange import RESULTS, SUBMISSIONS
from shared.schemas.route import DLQ_FAILED, DLQ_UNREADABLE, LANES, StepKind, topic_for

SERVICES: Mapping[str, StepKind] = {
    "tokenizer": "tokenize", "llm": "generate", "reward": "score", "decoder": "decode", "trainer": "train",
}  # fmt: skip
"""Worker service to the kind of step that it does."""
PARTITIONS = 32
"""Of each topic that carries steps: at least the most workers that one service may have."""
FEW_PARTITIONS = 4
"""Of topics that are read by one process or by people."""

EXPIRING = ("jobs/", "uploads/", "batches/", "webhooks/")
"""What lies below these prefixes of the artifact store goes by the bucket's own policy, if nobody removed it before."""
EXPIRE_DAYS = 8
"""A day longer than jobs are kept unless told otherwise."""


def group_of(service: str) -> str:
    """The group that the workers of a service read in."""
    return f"editx-{service}"


def broker_group(group: str, topics: Iterable[str]) -> str:
    """The id at the broker of a group's readers of some topics, such as editx-llm:editx.generate.

    Each set of topics has its own: a group whose members read different topics is dealt partitions by a leader that
    may not know the topics of the others.
    """
    return f"{group}:{'+'.join(sorted(topics))}"


def topics(partitions: int = PARTITIONS) -> dict[str, int]:
    """Every topic and its number of partitions."""
    steps = {topic_for(kind, lane): partitions for kind in SERVICES.values() for lane in LANES}
    others = [SUBMISSIONS, RESULTS, DLQ_UNREADABLE, DLQ_FAILED]
    return {**steps, **{topic: min(FEW_PARTITIONS, partitions) for topic in others}}
