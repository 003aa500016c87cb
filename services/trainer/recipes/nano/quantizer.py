"""A codebook that follows its data: k-means to start, exponential averages while training, dead codes moved to live
data.

After van den Oord et al., arXiv 1711.00937, and Dhariwal et al., arXiv 2005.00341. Knows nothing about speech.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Codebook(nn.Module):
    """Nearest-centroid quantisation with a straight-through gradient.

    Args:
        size: number of codes K.
        width: D.
        cosine: compare on the unit sphere (both sides are normalised), as the semantic tokenizer does.
        decay: of the running averages.
    """

    def __init__(self, size: int, width: int, *, cosine: bool = False, decay: float = 0.99) -> None:
        super().__init__()
        self.cosine, self.decay = cosine, decay
        self.register_buffer("centroids", torch.randn(size, width))
        self.register_buffer("counts", torch.ones(size))

    centroids: Tensor
    counts: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., D) -> quantised (..., D) with the gradient of x, codes (...), commitment loss."""
        with torch.autocast(x.device.type, enabled=False):
            x = F.normalize(x.float(), dim=-1) if self.cosine else x.float()
            flat = x.reshape(-1, x.shape[-1])
            codes = self.nearest(flat)
            if self.training:
                self._follow(flat.detach(), codes)
            quantised = self.centroids[codes].view_as(x)
            commitment = F.mse_loss(x, quantised.detach())
            return x + (quantised - x).detach(), codes.view(x.shape[:-1]), commitment

    def nearest(self, flat: Tensor) -> Tensor:
        """(N, D) -> (N,)."""
        return (flat @ self.centroids.T * 2 - self.centroids.square().sum(1)).argmax(1)

    @torch.no_grad()
    def fit(self, data: Tensor, rounds: int = 20) -> None:
        """k-means from a random start on data (N, D), N > K."""
        data = F.normalize(data.float(), dim=-1) if self.cosine else data.float()
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(data), generator=generator)[: len(self.centroids)]
        self.centroids.copy_(data[chosen.to(data.device)])
        for _ in range(rounds):
            codes = torch.cat([self.nearest(part) for part in data.split(8192)])
            self._move(data, codes, decay=0.0)

    def _follow(self, flat: Tensor, codes: Tensor) -> None:
        self._move(flat, codes, self.decay)

    @torch.no_grad()
    def _move(self, data: Tensor, codes: Tensor, decay: float) -> None:
        """Move centroids towards the means of their data; codes that nothing uses restart at random data."""
        counts = torch.zeros_like(self.counts).index_add_(0, codes, torch.ones_like(codes, dtype=torch.float32))
        sums = torch.zeros_like(self.centroids).index_add_(0, codes, data)
        weight = torch.where(
            counts > 0, (1 - decay) * counts / (decay * self.counts + (1 - decay) * counts).clamp(min=1e-6), 0.0
        )
        self.centroids.lerp_(sums / counts.clamp(min=1)[:, None], weight[:, None])
        self.counts.mul_(decay).add_(counts, alpha=1 - decay)
        dead = self.counts < 0.01 if decay else counts == 0
        if bool(dead.any()):
            number = int(dead.sum())
            picks = torch.randint(len(data), (number,), device=data.device)
            self.centroids[dead] = data[picks]
            self.counts[dead] = 0.5
        if self.cosine:
            self.centroids.copy_(F.normalize(self.centroids, dim=-1))
