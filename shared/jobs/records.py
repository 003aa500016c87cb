"""Job records as they are stored, JSON, and what is made of one that this release cannot read.

Another release may have written it. Whoever asks for that job is told; lists and sweeps go on without it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from pydantic import ValidationError

from shared.errors import PoisonError, reasons
from shared.schemas.job import Job

log = logging.getLogger(__name__)


def read_record(body: str | bytes) -> Job:
    """The job in a record. Raises PoisonError for one that this release cannot read."""
    try:
        return Job.model_validate_json(body)
    except ValidationError as error:
        raise PoisonError(f"The job's record cannot be read: {reasons(error)}.",
                          "Leave it to the release that wrote it.", "unreadable_job") from error  # fmt: skip


def read_records(bodies: Iterable[str | bytes]) -> list[Job]:
    """The jobs in records; one that cannot be read is logged and left out."""
    found = []
    for body in bodies:
        try:
            found.append(read_record(body))
        except PoisonError as error:
            log.warning("a job is left out: %s", error)
    return found
