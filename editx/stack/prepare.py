"""Makes what the hosted shape needs before anything runs: topics, the bucket and its expiry. Safe to run again.

`python -m editx.stack.prepare`, with the same EDITX_* settings as the services.
"""

from __future__ import annotations

from pydantic import Field

from shared.bus import kafka
from shared.service import ServiceSettings
from shared.store import s3
from shared.topology import EXPIRE_DAYS, EXPIRING, PARTITIONS, topics


class PrepareSettings(ServiceSettings):
    """How large topics are made and how long artifacts lie. Jobs are forgotten first, by the sweeper."""

    partitions: int = Field(default=PARTITIONS, ge=1)
    replication: int = Field(default=1, ge=1)
    expire_days: int = Field(default=EXPIRE_DAYS, ge=1)


def main() -> None:
    """Make what is missing, and leave the rest as it is."""
    settings = PrepareSettings()
    bus = kafka.connect(settings.bus_url)
    bus.create_topics(topics(settings.partitions), replication=settings.replication)
    bus.close()
    s3.connect(settings.store_url).create_bucket(dict.fromkeys(EXPIRING, settings.expire_days))


if __name__ == "__main__":
    main()
