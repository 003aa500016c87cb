"""Which rollouts and scores a PPO run gets: drawn here, or by servers whose addresses the operator has set.

Knows the ports of servers, not how one is run.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import torch

from services.trainer.core.distributed import join_group
from services.trainer.core.sampling import Vocabulary
from services.trainer.ppo.config import PpoConfig
from services.trainer.ppo.pool import Pool, Server
from services.trainer.ppo.rollouts import LocalRollouts, LocalScorer, PoolRollouts, PoolScorer, Rollouts, Scorer
from services.trainer.settings import TrainerSettings
from shared.checkpoints.layout import Checkpoint
from shared.checkpoints.reward import load_reward
from shared.checkpoints.step1 import load_step1
from shared.errors import UserError
from shared.inference.port import Inference
from shared.wiring import open_inference


@dataclass(frozen=True)
class Request:
    """What a source is made for: the SFT checkpoint, the reward model's, the run's config."""

    base: Checkpoint
    reward: Checkpoint
    vocabulary: Vocabulary
    config: PpoConfig
    device: str


MakeRollouts = Callable[[Request], Rollouts]
MakeScorer = Callable[[Request], Scorer]
ServeModels = Callable[[Checkpoint, str], Inference]
"""Checkpoint and device -> its models "tokenizer" and "decoder"."""


def local_rollouts(request: Request) -> Rollouts:
    """The trainer's own sampler."""
    return LocalRollouts(load_step1(request.base, device=request.device), request.vocabulary)


def local_scorer(request: Request) -> Scorer:
    """The reward model in this process."""
    return LocalScorer(load_reward(request.reward, dtype=torch.float32, device=request.device)[0], request.vocabulary)


def pool_rollouts(settings: TrainerSettings) -> MakeRollouts:
    """Servers of the model "llm" at EDITX_TRAINER_POOL, which load from EDITX_TRAINER_POOL_FOLDER."""

    def make(request: Request) -> Rollouts:
        if not settings.pool or settings.pool_folder is None:
            raise UserError("Rollouts from a pool need the addresses of its servers and a folder that they load from.",
                            "Set EDITX_TRAINER_POOL=triton://host:8001 and EDITX_TRAINER_POOL_FOLDER.",
                            "invalid_training")  # fmt: skip
        servers = [cast(Server, open_inference(url, {})) for url in addresses(settings.pool)]
        group = join_group(request.config.loop.sharding, request.device)
        pool = Pool(servers, settings.pool_folder, request.base, ahead=request.config.max_staleness > 0, group=group)
        return PoolRollouts(cast(Inference, pool), pool.deploy, pool.deployed, close=pool.close)

    return make


def pool_scorer(settings: TrainerSettings) -> MakeScorer:
    """The reward service at EDITX_TRAINER_REWARD_URL, which must serve the reward model of the run."""

    def make(request: Request) -> Scorer:
        if not settings.reward_url:
            raise UserError("Scores of the reward service need its address.",
                            "Set EDITX_TRAINER_REWARD_URL=triton://host:8001.", "invalid_training")  # fmt: skip
        return PoolScorer(open_inference(settings.reward_url, {}))

    return make


def pool_models(settings: TrainerSettings) -> ServeModels | None:
    """What decodes for a judge: the server at EDITX_TRAINER_REWARD_URL, whose tokenizer and decoder know the same
    codes; None without one."""
    return (lambda checkpoint, device: open_inference(settings.reward_url, {})) if settings.reward_url else None


def addresses(pool: str) -> list[str]:
    """The URLs of all servers behind a comma-separated list: a host name stands for each address that it has."""
    found: list[str] = []
    for url in filter(None, (part.strip() for part in pool.split(","))):
        parts = urlsplit(url)
        try:
            known = socket.getaddrinfo(parts.hostname, parts.port, socket.AF_INET, socket.SOCK_STREAM)
        except OSError as error:
            raise UserError(f"The pool's server {url} has no address: {error}.", code="invalid_training") from error
        sockets = [cast(tuple[str, int], address) for *_, address in known]
        found += [f"{parts.scheme}://{host}:{port}" for host, port in sockets]
    return list(dict.fromkeys(found))
