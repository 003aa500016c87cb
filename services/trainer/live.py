"""What a job published, served: the model servers that an operator names load it anew. Knows no training."""

from __future__ import annotations

from typing import Protocol, cast

from services.trainer.ppo.sources import addresses
from services.trainer.settings import TrainerSettings
from shared.wiring import open_inference


class ModelServer(Protocol):
    """A model server as an operator sees it."""

    def models(self) -> list[dict[str, str]]: ...
    def load(self, model: str) -> None: ...
    def close(self) -> None: ...


def put_live(settings: TrainerSettings, model: str) -> int:
    """Have those servers at EDITX_TRAINER_SERVERS that serve the model load it anew, while calls go on; how many did.

    Raises InferenceUnavailable for one that does not answer or cannot load it.
    """
    loaded = 0
    for url in addresses(settings.servers):
        server = cast(ModelServer, open_inference(url, {}))
        try:
            if any(found["name"] == model and found["state"] == "READY" for found in server.models()):
                server.load(model)
                loaded += 1
        finally:
            server.close()
    return loaded
