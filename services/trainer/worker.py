"""The process of the trainer service: wires the train step to the worker runtime."""

from __future__ import annotations

from services.trainer.handler import TrainHandler
from services.trainer.states import States
from shared.inference.port import Inference
from shared.service import ServiceSettings, run_worker
from shared.wiring import open_store


def make_handler(inference: Inference, settings: ServiceSettings) -> TrainHandler:
    """Training loads its own models; data sets and states come from the artifact store."""
    return TrainHandler(States(open_store(settings.store_url)))


def main() -> None:
    """Work until SIGTERM. Training needs no model server."""
    run_worker("trainer", make_handler, {})


if __name__ == "__main__":
    main()
