"""The chat format of Step-Audio-EditX (arXiv 2511.03601): text ids, audio ids, turns and the published instructions.

Strings are verbatim, because the published weights were trained on them. A chat is encoded by joining text ids and
audio ids as arrays; audio never passes through text. Knows nothing about models and sampling.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import sentencepiece

from shared.codes import AUDIO_VOCAB, Codes
from shared.errors import MissingComponent, UserError
from shared.schemas.edit import Edit
from shared.tags import TAGS, check_tag, check_text_tags

__all__ = [
    "TAGS",
    "TextTokenizer",
    "Turn",
    "assistant_turn",
    "check_tag",
    "clone_turns",
    "edit_turns",
    "instruction",
    "with_audio_pieces",
]

Role = Literal["system", "human", "assistant"]
Ids = npt.NDArray[np.int64]

BOS, EOS, BOT = 1, 3, 4
FIRST_AUDIO_PIECE = "<audio_0>"
DEFAULT_SPEAKER = "debug"

CLONE_SYSTEM_PROMPT = (
    "Generate audio with the following timbre, prosody and speaking style\n\n"
    "[speaker_start]\n"
    "speaker name: {speaker}\n"
    "speaker prompt text: \n"
    "{prompt_text}\n"
    "speaker audio tokens: \n"
)
CLONE_SYSTEM_PROMPT_END = "\n[speaker_end]\n"

AUDIO_EDIT_SYSTEM_PROMPT = (
    "As a highly skilled audio editing and tuning specialist, you excel in interpreting user instructions and applying "
    "precise adjustments to meet their needs. Your expertise spans a wide range of enhancement capabilities, including "
    "but not limited to:\n"
    "# Emotional Enhancement\n"
    "# Speaking Style Transfer\n"
    "# Non-linguistic Adjustments\n"
    "# Audio Tuning & Editing\n"
    "Note: You will receive instructions in natural language and are expected to accurately interpret and execute the "
    "most suitable audio edits and enhancements.\n"
)

_CORRESPONDS = "The text corresponding to the audio is: {text}\n"
INSTRUCTIONS = {
    "emotion": "Make the following audio more {detail}. " + _CORRESPONDS,
    "speed": "Make the following audio more {detail}. " + _CORRESPONDS,
    "style": "Make the following audio more {detail} style. " + _CORRESPONDS,
    "emotion remove": "Remove any emotion in the following audio and the reference text is: {text}\n",
    "style remove": "Remove any speaking styles in the following audio and the reference text is: {text}\n",
    "denoise": (
        "Remove any noise from the given audio while preserving the voice content clearly. Ensure that the speech "
        "quality remains intact with minimal distortion, and eliminate all noise from the audio.\n"
    ),
    "vad": (
        "Remove any silent portions from the given audio while preserving the voice content clearly. Ensure that the "
        "speech quality remains intact with minimal distortion, and eliminate all silence from the audio.\n"
    ),
    "paralinguistic": (
        "Add some non-verbal sounds to make the audio more natural, the new text is : {target}\n  " + _CORRESPONDS
    ),
}

_RESERVED = re.compile(r"<audio_\d+>|<\|[^|<>]*\|>|</?s>")


@dataclass(frozen=True, eq=False)
class Turn:
    """One turn: who speaks, and its content, pieces of text (str) and of audio (mixed ids, int array) in order."""

    role: Role
    content: tuple[str | Codes, ...]


class TextTokenizer:
    """The sentencepiece model of a checkpoint, with the audio ids behind the text ids.

    `audio_offset` is the id of the piece "<audio_0>" (65536 in the official release): mixed id k is offset + k.
    """

    bos, eos, bot = BOS, EOS, BOT

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        self._pieces = processor
        self.audio_offset: int = processor.piece_to_id(FIRST_AUDIO_PIECE)
        self.vocab_size: int = processor.vocab_size()
        present = processor.id_to_piece(self.audio_offset) == FIRST_AUDIO_PIECE
        if not present or self.audio_offset + AUDIO_VOCAB > self.vocab_size:
            raise UserError(
                f"The text tokenizer of {self.vocab_size} pieces lacks the {AUDIO_VOCAB} audio pieces.",
                "Use the tokenizer.model of a Step-Audio-EditX checkpoint.",
                "checkpoint_invalid",
            )

    @classmethod
    def from_file(cls, path: Path) -> TextTokenizer:
        """Read a tokenizer.model. Raises MissingComponent when there is none or it is not a sentencepiece model."""
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise MissingComponent("The text tokenizer", f"{path}: {error}", "Fetch the checkpoint again.") from error
        return cls(processor)

    def encode(self, text: str) -> list[int]:
        """Ids of a text on its own; `<audio_K>` in it becomes an audio id."""
        return list(self._pieces.encode(text, out_type=int))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; audio ids come out as `<audio_K>`."""
        return str(self._pieces.decode([int(i) for i in ids]))

    def audio_ids(self, mixed: npt.ArrayLike) -> Ids:
        """Mixed ids 0..5119 (n,) to the ids of this vocabulary. Raises UserError naming a position out of range."""
        codes = np.asarray(mixed, dtype=np.int64).reshape(-1)
        wrong = np.flatnonzero((codes < 0) | (codes >= AUDIO_VOCAB))
        if wrong.size:
            raise UserError(f"Audio token {wrong[0]} is {codes[wrong[0]]}, outside 0..{AUDIO_VOCAB - 1}.",
                            "Make audio tokens with shared.codes.interleave.", "invalid_codes")  # fmt: skip
        return codes + self.audio_offset

    def _text_ids(self, text: str, *, after_audio: bool, before_audio: bool) -> list[int]:
        """Ids of a text as they come out inside `...audio text audio...`, where neighbours change its edges."""
        whole = FIRST_AUDIO_PIECE * after_audio + text + FIRST_AUDIO_PIECE * before_audio
        ids = self.encode(whole)
        start = ids.index(self.audio_offset) + 1 if after_audio else 0
        return ids[start : len(ids) - before_audio]

    def _turn_ids(self, turn: Turn) -> list[Ids]:
        pieces: list[str | Codes] = [f"{turn.role}\n"]
        for piece in turn.content:
            last = pieces[-1]
            if isinstance(piece, str) and isinstance(last, str):
                pieces[-1] = last + piece
            else:
                pieces.append(piece)
        arrays = [np.array([BOT], dtype=np.int64)]
        for place, piece in enumerate(pieces):
            if isinstance(piece, str):
                ids = self._text_ids(piece, after_audio=place > 0, before_audio=place + 1 < len(pieces))
                arrays.append(np.array(ids, dtype=np.int64))
            else:
                arrays.append(self.audio_ids(piece))
        return arrays

    def encode_chat(self, turns: Sequence[Turn], generation_prompt: bool = True) -> list[int]:
        """A conversation as ids: <s>, then per turn <|BOT|> role newline content <|EOT|>.

        With `generation_prompt` an assistant's turn is opened for the model to fill. Equal to encoding the same chat
        with its audio written as `<audio_K>` text, many times faster.
        """
        arrays = [np.array([BOS], dtype=np.int64)]
        for turn in turns:
            arrays += [*self._turn_ids(turn), np.array([EOS], dtype=np.int64)]
        if generation_prompt:
            arrays += self._turn_ids(Turn("assistant", ()))
        return [int(i) for i in np.concatenate(arrays)]


def with_audio_pieces(model: bytes, count: int = AUDIO_VOCAB) -> bytes:
    """A serialised sentencepiece model with `<audio_0>`..`<audio_count-1>` appended as user-defined pieces.

    For making a checkpoint's tokenizer.model: a protobuf grows a repeated field by concatenation.
    """
    user_defined = 4
    pieces = []
    for k in range(count):
        name = f"<audio_{k}>".encode()
        message = b"\x0a" + bytes([len(name)]) + name + b"\x15" + struct.pack("<f", 0.0) + bytes([0x18, user_defined])
        pieces.append(b"\x0a" + bytes([len(message)]) + message)
    return model + b"".join(pieces)


def _plain(name: str, text: str | None) -> str:
    """The text, refused if it is missing or holds the tokenizer's own markers."""
    if not text or not text.strip():
        raise UserError(f"{name} is empty.", "Give the words that are spoken.", "missing_text")
    found = _RESERVED.search(text)
    if found:
        raise UserError(f"{name} holds the reserved marker {found.group()!r} at position {found.start()}.",
                        "Remove it: such markers steer the model.", "reserved_text")  # fmt: skip
    return text


def clone_turns(
    prompt_text: str, prompt_mixed: npt.ArrayLike, target_text: str, speaker: str = DEFAULT_SPEAKER
) -> list[Turn]:
    """The turns that make the model speak `target_text` like the reference (its text and mixed ids (n,)).

    Raises UserError for empty texts, reserved markers and unknown [tags].
    """
    opening = CLONE_SYSTEM_PROMPT.format(speaker=speaker, prompt_text=_plain("The reference's text", prompt_text))
    reference = np.asarray(prompt_mixed, dtype=np.int32)
    target = check_text_tags(_plain("The text to speak", target_text))
    return [Turn("system", (opening, reference, CLONE_SYSTEM_PROMPT_END)), Turn("human", (target,))]


def instruction(edit: Edit, source_text: str | None) -> str:
    """The published sentence of an edit, with its newline.

    Raises UserError for a clone (it has none), unknown tags and empty texts.
    """
    if edit.type == "clone":
        raise UserError("A clone has no instruction.", "Use clone_turns.", "invalid_request")
    text = _plain("The recording's text", source_text).strip() if edit.needs_source_text else ""
    if edit.type == "paralinguistic":
        target = check_text_tags(_plain("The new text", edit.target_text))
        return INSTRUCTIONS[edit.type].format(target=target, text=text)
    if edit.detail is None:
        return INSTRUCTIONS[edit.type]
    detail = check_tag(edit.type, edit.detail)
    key = f"{edit.type} {detail}"
    return INSTRUCTIONS.get(key, INSTRUCTIONS[edit.type]).format(detail=detail, text=text)


def edit_turns(edit: Edit, source_text: str | None, source_mixed: npt.ArrayLike) -> list[Turn]:
    """The turns of any edit of a recording (its text and mixed ids (n,)); a clone takes the recording as reference."""
    if edit.type == "clone":
        return clone_turns(source_text or "", source_mixed, edit.target_text or "")
    source = np.asarray(source_mixed, dtype=np.int32)
    return [
        Turn("system", (AUDIO_EDIT_SYSTEM_PROMPT,)),
        Turn("human", (instruction(edit, source_text) + "\n", source, "\n")),
    ]


def assistant_turn(mixed: npt.ArrayLike) -> Turn:
    """The answer as training data has it: nothing but audio."""
    return Turn("assistant", (np.asarray(mixed, dtype=np.int32),))
