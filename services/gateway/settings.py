"""What an operator can set about the gateway, by environment variables that begin with EDITX_."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr

from shared.audio.io import MAX_BYTES, MAX_DURATION_S
from shared.service import ServiceSettings


class GatewaySettings(ServiceSettings):
    """Where the gateway listens, whom it lets in, and how much it takes. The URLs of its surroundings are inherited."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    public_url: str = Field(
        default="http://127.0.0.1:8000", description="The gateway's own address, as clients see it."
    )

    api_keys_file: Path | None = Field(
        default=None, description="JSON list of keys (docs/api.md); without it everybody is the user local."
    )
    requests_per_minute: int = Field(default=600, ge=1, description="Of a key that sets none: calls that cost work.")
    open_jobs_max: int = Field(default=100, ge=1, description="Of a key that sets none: jobs that have not ended.")

    max_bytes: int = Field(default=MAX_BYTES, ge=1024, description="Largest recording, in bytes as sent.")
    max_duration_s: float = Field(default=MAX_DURATION_S, gt=0.0, description="Longest recording.")
    max_json_bytes: int = Field(
        default=128 * 1024 * 1024, ge=1024, description="Largest JSON body, audio in it included."
    )
    batch_max: int = Field(default=100, ge=1, le=1000, description="Most edits of one batch.")
    backlog_interactive_max: int = Field(default=200, ge=0, description="Waiting steps above which a lane is refused.")
    backlog_batch_max: int = Field(default=10_000, ge=0)
    backlog_every_s: float = Field(default=5.0, gt=0.0, description="Between looks at the bus for the backlog.")
    wait_max_s: float = Field(default=60.0, ge=0.0, description="Longest `Prefer: wait`.")
    listeners_max: int = Field(default=256, ge=1, description="Open event streams and waiting calls.")
    speech_max: int = Field(default=4, ge=1, description="Speech answers that are made at once.")
    heartbeat_s: float = Field(default=15.0, gt=0.0, description="Between comments on a silent event stream.")

    job_keep_s: float = Field(default=7 * 86_400.0, gt=0.0, description="Jobs and their artifacts are kept as long.")
    upload_keep_s: float = Field(default=86_400.0, gt=0.0)
    url_expires_s: int = Field(default=900, ge=1, le=604_800, description="Life of presigned URLs.")
    sweep: bool = Field(default=True, description="Put back jobs that stopped moving; any number of gateways may.")

    webhook_secret: SecretStr | None = Field(
        default=None, description="whsec_... for keys that have none of their own."
    )
    webhook_allowed_hosts: tuple[str, ...] = Field(
        default=(), description="Hosts that may be private and plain HTTP: for tests and one's own network."
    )
    webhook_timeout_s: float = Field(default=10.0, gt=0.0)
    webhook_retries_s: tuple[float, ...] = Field(
        default=(5.0, 30.0, 120.0, 900.0, 3600.0, 14_400.0, 43_200.0), description="Waits between attempts."
    )
