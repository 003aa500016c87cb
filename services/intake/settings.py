"""What an operator can set about the intake, by environment variables that begin with EDITX_."""

from __future__ import annotations

from pydantic import Field

from shared.service import ServiceSettings


class IntakeSettings(ServiceSettings):
    """How long jobs are kept, and how often those that stopped moving are looked for."""

    job_keep_s: float = Field(default=7 * 86_400.0, gt=0.0, description="Jobs and their artifacts are kept as long.")
    sweep_every_s: float = Field(default=5.0, gt=0.0)
