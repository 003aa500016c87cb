"""The dual-codebook embedding: one table, two look-ups per frame. Knows nothing about how codes are interleaved."""

import torch
from torch import Tensor, nn


class DualCodebookEmbedding(nn.Module):
    """Embeds (linguistic, semantic) id pairs with one shared table of half the model width (arXiv 2511.03601)."""

    def __init__(self, vocab_size: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, size // 2)

    def forward(self, pairs: Tensor) -> Tensor:
        """(B, T, 2) ids -> (B, T, size): the linguistic half, then the semantic half."""
        return torch.flatten(self.embedding(pairs), start_dim=-2)
