"""The reward model of Step-Audio-EditX (arXiv 2511.03601): the language model's trunk with a score per token on top.

The head is one linear layer in float32. The model reads a prompt and an answer as one sequence and scores every answer
token; how scores become one number is the caller's. Knows nothing about prompts, pairs or files.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shared.models.step1 import Step1


class Step1Reward(nn.Module):
    """A Step1 whose hidden states are turned into scores. The trunk's own output head, if it has one, is not used.

    `mean` and `std` are buffers that put scores on a common scale: a score is (raw - mean) / std.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, trunk: Step1) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(trunk.config.hidden_size, 1, device=trunk.device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.zeros((), device=trunk.device))
        self.register_buffer("std", torch.ones((), device=trunk.device))

    def forward(self, input_ids: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
        """Ids (B, L) -> scores (B, L) float32; a score has read everything up to and with its token."""
        hidden = self.trunk.hidden_states(input_ids, document_ids=document_ids)
        with torch.autocast(hidden.device.type, enabled=False):
            raw: Tensor = self.head(hidden.float()).squeeze(-1)
            return (raw - self.mean) / self.std
