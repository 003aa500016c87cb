"""The process of the intake: submissions from the bus become jobs, and a sweeper puts back those that stopped moving.

Needs no model. Any number may run at once.
"""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType

from services.intake.settings import IntakeSettings
from shared import telemetry
from shared.checkpoints.layout import Checkpoint
from shared.errors import UserError
from shared.intake import Intake
from shared.sweeper import Sweeper
from shared.wiring import open_bus, open_jobs, open_store

log = logging.getLogger(__name__)


def main() -> None:
    """Work until SIGTERM."""
    settings = IntakeSettings()
    telemetry.configure_logs(settings.log_level, as_json=settings.log_json)
    end = telemetry.configure("intake", spans_file=settings.spans_file, otlp_endpoint=settings.otlp_endpoint)
    bus, store, jobs = open_bus(settings.bus_url), open_store(settings.store_url), open_jobs(settings.jobs_url)
    sweeper = Sweeper(jobs, bus, store, settings.sweep_every_s)
    intake = Intake(bus, store, jobs, keep_s=settings.job_keep_s, checkpoint=_checkpoint(settings.checkpoint))

    def stop(_: int, __: FrameType | None) -> None:
        intake.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    sweeper.start()
    alive = _Alive(settings)
    try:
        intake.run()
    finally:
        alive.stop()
        sweeper.stop()
        bus.close()
        jobs.close()
        end()


def _checkpoint(name: str) -> Checkpoint | None:
    """The checkpoint that is served; None where this machine does not have it."""
    try:
        return Checkpoint.resolve(name)
    except UserError as error:
        log.warning("submissions are not held against the checkpoint: %s", error)
        return None


class _Alive:
    """Touches the file that tells a container's probe that this process is well."""

    def __init__(self, settings: IntakeSettings) -> None:
        self._file = settings.alive_file
        self._stop = threading.Event()
        if self._file is not None:
            threading.Thread(target=self._run, name="alive", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while self._file is not None:
            self._file.touch()
            if self._stop.wait(1.0):
                return


if __name__ == "__main__":
    main()
