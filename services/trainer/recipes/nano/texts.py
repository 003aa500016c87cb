"""Sentences for the small checkpoint's corpus: WordNet's usage examples (English), graded HSK sentences (Mandarin).

Split by a hash of the text, so a sentence is held out in every voice and style at once. Knows nothing about audio.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HELD_OUT_SHARE = 0.04
_EXAMPLE = re.compile(r'"([^"]{12,160})"')
_PLAIN = re.compile(r"[A-Za-z][A-Za-z ,.'!?;-]+$")


@dataclass(frozen=True)
class Sentence:
    """A text with its language ("en" or "zh") and whether it is kept out of all training."""

    text: str
    language: str
    held_out: bool


def is_held_out(text: str) -> bool:
    """A fixed 4 % of all texts, by hash."""
    digest = hashlib.sha256(text.lower().encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def english(wordnet: Path) -> list[Sentence]:
    """Usage examples of 4 to 18 words, capitalised and closed with a stop, in a fixed order without repeats."""
    found: dict[str, None] = {}
    for part in ("noun", "verb", "adj", "adv"):
        for line in (wordnet / f"data.{part}").read_text(encoding="utf-8", errors="replace").splitlines():
            for example in _EXAMPLE.findall(line.partition(" | ")[2]):
                text = example.strip(" ;,-")
                if 4 <= len(text.split()) <= 18 and _PLAIN.match(text):
                    found[text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")] = None
    return [Sentence(text, "en", is_held_out(text)) for text in sorted(found)]


def mandarin(hsk: Path) -> list[Sentence]:
    """HSK sentences of at most 30 characters."""
    texts = sorted({row["chinese"] for row in json.loads(hsk.read_text(encoding="utf-8"))})
    return [Sentence(text, "zh", is_held_out(text)) for text in texts if 4 <= len(text) <= 30]


def utterance(sentences: list[Sentence], rng: np.random.Generator, longest_words: int = 24) -> Sentence:
    """One to three sentences of one split joined, so that lengths reach from a phrase to some ten seconds."""
    first = sentences[int(rng.integers(len(sentences)))]
    parts = [first.text]
    for _ in range(int(rng.choice(3, p=[0.45, 0.4, 0.15]))):
        extra = sentences[int(rng.integers(len(sentences)))]
        if (
            extra.held_out == first.held_out
            and sum(len(p.split()) for p in parts) + len(extra.text.split()) <= longest_words
        ):
            parts.append(extra.text)
    joiner = "" if first.language == "zh" else " "
    return Sentence(joiner.join(parts), first.language, first.held_out)
