"""A small CTC recogniser on audio tokens: which letters a sequence of codes says, and how likely it says a text.

Embedding, look-ahead and conformer layers are the flow encoder's before doubling, so training starts from a trained
flow. It reads Latin letters; of texts in other scripts it says nothing. Knows nothing about edits or files.
(CTC: Graves et al., 2006.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.models.flow.embedding import DualCodebookEmbedding
from shared.models.flow.encoder import ConformerLayer, EncoderConfig, InputLayer, LookaheadLayer, run_layers

LETTERS = " 'abcdefghijklmnopqrstuvwxyz"
BLANK = 0
WORST_LOSS = 20.0
"""Per letter, of a text that cannot be said in so few frames."""
_BRACKETED = re.compile(r"\[[^\]]*\]")
_NOT_LETTERS = re.compile(r"[^a-z']+")


@dataclass(frozen=True)
class RecognizerConfig:
    """Sizes of the recogniser."""

    vocab_size: int = 5121
    size: int = 256
    num_blocks: int = 3
    attention_heads: int = 4
    linear_units: int = 768
    lookahead: int = 3

    @property
    def layer(self) -> EncoderConfig:
        """Of one conformer layer."""
        return EncoderConfig(output_size=self.size, attention_heads=self.attention_heads,
                             linear_units=self.linear_units, dropout_rate=0.0)  # fmt: skip


def letters(text: str) -> list[int]:
    """The letters that a reader of the text says, as ids from 1; sounds in brackets, digits and punctuation are left
    out. Empty for a text in another script, in whole or in part."""
    spoken = _BRACKETED.sub(" ", text).lower().replace("’", "'")
    if any(char.isalpha() and char not in LETTERS for char in spoken):
        return []
    words = _NOT_LETTERS.sub(" ", spoken).strip()
    return [LETTERS.index(char) + 1 for char in words]


def frames_needed(text: Sequence[int]) -> int:
    """The fewest frames in which CTC can say letters: one each, and one between two alike."""
    return len(text) + sum(first == second for first, second in pairwise(text))


class Recognizer(nn.Module):
    """Pairs of codes at 25 Hz to letters."""

    def __init__(self, config: RecognizerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = DualCodebookEmbedding(config.vocab_size, config.size)
        self.embed = InputLayer(config.size, config.size, 0.0)
        self.pre_lookahead_layer = LookaheadLayer(config.size, config.lookahead)
        self.encoders = nn.ModuleList(ConformerLayer(config.layer) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.size)
        self.head = nn.Linear(config.size, len(LETTERS) + 1)

    def forward(self, pairs: Tensor, lengths: Tensor) -> Tensor:
        """Pairs (B, T, 2) with lengths (B,) -> log probabilities (B, T, letters + 1) float32, the blank first."""
        mask = torch.arange(pairs.shape[1], device=pairs.device) < lengths[:, None]
        x = self.embed(self.embedding(pairs)) * mask[..., None]
        x, _ = self.pre_lookahead_layer(F.pad(x, (0, 0, 0, self.config.lookahead)), None)
        x, _ = run_layers(self.encoders, x, mask, [None] * len(self.encoders))
        out: Tensor = self.head(self.norm(x)).float().log_softmax(-1)
        return out

    def read(self, pairs: Tensor, lengths: Tensor) -> list[str]:
        """The likeliest letter of every frame of pairs (B, T, 2) with lengths (B,), as texts: blanks and repetitions
        left out, no language known."""
        texts = []
        for frames, length in zip(self(pairs, lengths).argmax(-1), lengths.tolist(), strict=True):
            said = torch.unique_consecutive(frames[:length]).tolist()
            texts.append("".join(LETTERS[letter - 1] for letter in said if letter != BLANK).strip())
        return texts

    def loss(self, pairs: Tensor, lengths: Tensor, texts: list[list[int]]) -> Tensor:
        """Minus the log likelihood per letter of texts (of `letters`, none empty), (B,) float32; at most WORST_LOSS."""
        counts = torch.tensor([len(text) for text in texts], device=pairs.device)
        wanted = torch.tensor([letter for text in texts for letter in text], device=pairs.device)
        needed = torch.tensor([frames_needed(text) for text in texts], device=pairs.device)
        by_frame = self(pairs, lengths).transpose(0, 1)
        total = F.ctc_loss(by_frame, wanted, lengths, counts, blank=BLANK, reduction="none", zero_infinity=True)
        return torch.where(needed <= lengths, (total / counts).clamp(max=WORST_LOSS), WORST_LOSS)
