"""Train the text tokenizer: short pieces, whole prompt templates as single pieces, audio pieces last.

Short pieces, since a small model learns how letters sound from little data; and the published prompts cost a few
tokens instead of hundreds, since each of their sentences is a piece of its own. `python -m
services.trainer.recipes.nano.text_tokenizer`.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from services.trainer.recipes.nano import assets, texts
from shared import prompts

VOCABULARY = 3200
LONGEST_PIECE = 4


def template_pieces() -> list[str]:
    """The fixed parts of every published prompt, longest first, with their inner spaces but no outer ones."""
    opening, _, rest = prompts.CLONE_SYSTEM_PROMPT.partition("{speaker}")
    before_text, _, after_text = rest.partition("{prompt_text}")
    whole = [
        opening + prompts.DEFAULT_SPEAKER + before_text.rstrip(),
        after_text,
        prompts.CLONE_SYSTEM_PROMPT_END,
        prompts.AUDIO_EDIT_SYSTEM_PROMPT,
        "system\n", "human\n", "assistant\n",
    ]  # fmt: skip
    for sentence in prompts.INSTRUCTIONS.values():
        for part in sentence.replace("{detail}", "\0").replace("{text}", "\0").replace("{target}", "\0").split("\0"):
            whole.append(part.strip(" ") if part.strip() else "")
    tags = [name for kind in ("emotion", "style", "speed") for name in prompts.TAGS[kind] if name != "remove"]
    pieces = {piece for piece in whole + [f" {tag}" for tag in tags] if len(piece) > 1}
    return sorted(pieces, key=len, reverse=True)


def train(found: assets.Assets, target: Path) -> Path:
    """Write tokenizer.model; the same file for the same texts."""
    lines = [s.text for s in texts.english(found.wordnet) if not s.held_out] + [
        s.text for s in texts.mandarin(found.hsk) if not s.held_out
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="unigram", vocab_size=VOCABULARY,
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, control_symbols=["<|EOT|>", "<|BOT|>"],
        normalization_rule_name="identity", remove_extra_whitespaces=False, max_sentencepiece_length=LONGEST_PIECE,
        character_coverage=0.9999, num_threads=1, split_digits=True, minloglevel=2,
    )  # fmt: skip
    names = (text.replace(" ", "▁") for text in template_pieces())
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(prompts.with_audio_pieces(with_pieces(model.getvalue(), names)))
    return target


def with_pieces(model: bytes, names: Iterable[str]) -> bytes:
    """A serialised sentencepiece model with user-defined pieces appended; protobuf grows a repeated field by
    concatenation."""

    def field(number: int, payload: bytes) -> bytes:
        length = len(payload)
        return bytes([number << 3 | 2, *([length] if length < 128 else [length & 127 | 128, length >> 7])]) + payload

    score_and_kind = b"\x15" + struct.pack("<f", 0.0) + b"\x18\x04"
    return model + b"".join(field(1, field(1, name.encode()) + score_and_kind) for name in names)


def tokenizer_file() -> Path:
    """Where the recipes keep it; trained on first use."""
    target = assets.data_dir() / "runs" / "text" / "tokenizer.model"
    return target if target.exists() else train(assets.prepare(), target)


if __name__ == "__main__":
    print(tokenizer_file())
