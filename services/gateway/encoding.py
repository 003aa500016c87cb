"""Samples to the bytes of an audio format, piece by piece, so that a listener hears the first before the last is made.

Each encoder's pieces, joined, are one valid file. A streamed WAV cannot know its length and says the largest.
"""

from __future__ import annotations

import io
import struct
from typing import Protocol

import numpy as np
import numpy.typing as npt
import soundfile

from shared.errors import UserError

Samples = npt.NDArray[np.float32]
UNKNOWN_LENGTH = 0xFFFFFFFF
MP3_KBPS = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)  # MPEG 2, layer III
CONTENT_TYPES = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}


class Encoder(Protocol):
    """Takes mono samples (n,) in -1..1; `push` and `finish` give the bytes that are ready, possibly none."""

    def push(self, samples: Samples) -> bytes: ...
    def finish(self) -> bytes: ...


def encoder(form: str, sample_rate_hz: int) -> Encoder:
    """The encoder of a format. Raises UserError for one that is not supported."""
    if form in ("wav", "pcm"):
        return _Pcm(sample_rate_hz, with_header=form == "wav")
    if form in ("mp3", "opus", "flac"):
        return _Compressed(form, sample_rate_hz)
    raise UserError(f"The format {form} is not supported.", f"Use one of {', '.join(CONTENT_TYPES)}.", "unknown_format")


class _Pcm:
    """16-bit little-endian samples, below a WAV header or bare."""

    def __init__(self, sample_rate_hz: int, *, with_header: bool) -> None:
        self._header = _wav_header(sample_rate_hz) if with_header else b""

    def push(self, samples: Samples) -> bytes:
        header, self._header = self._header, b""
        return header + (np.clip(samples, -1.0, 1.0) * 32767.0).astype("<i2").tobytes()

    def finish(self) -> bytes:
        return self._header


class _Compressed:
    """MP3 and Opus as their encoder writes them; FLAC whole at the end, since its header tells the length."""

    def __init__(self, form: str, sample_rate_hz: int) -> None:
        container, subtype = {
            "mp3": ("MP3", "MPEG_LAYER_III"), "opus": ("OGG", "OPUS"), "flac": ("FLAC", "PCM_16")
        }[form]  # fmt: skip
        constant = {"bitrate_mode": "CONSTANT", "compression_level": 0.5} if form == "mp3" else {}
        self._form = form
        self._buffer = io.BytesIO()
        self._file = soundfile.SoundFile(
            self._buffer, "w", sample_rate_hz, 1, format=container, subtype=subtype, **constant
        )
        self._sent = 0

    def push(self, samples: Samples) -> bytes:
        self._file.write(np.clip(samples, -1.0, 1.0))
        return b"" if self._form == "flac" else self._new()

    def finish(self) -> bytes:
        self._file.close()
        return self._new()

    def _new(self) -> bytes:
        written = self._buffer.getvalue()
        if self._form == "mp3" and not self._sent and len(written) >= 4:
            self._sent = _mp3_frame_bytes(written)  # the first frame holds lengths that are known only at the end
        new, self._sent = written[self._sent :], max(self._sent, len(written))
        return new


def _wav_header(sample_rate_hz: int) -> bytes:
    form = struct.pack("<IHHIIHH", 16, 1, 1, sample_rate_hz, 2 * sample_rate_hz, 2, 16)
    unknown = struct.pack("<I", UNKNOWN_LENGTH)
    return b"RIFF" + unknown + b"WAVEfmt " + form + b"data" + unknown


def _mp3_frame_bytes(data: bytes) -> int:
    """Length of the first frame of an MPEG 2, layer III stream, the kind that 24 kHz audio has."""
    header = int.from_bytes(data[:4], "big")
    return 72 * MP3_KBPS[(header >> 12) & 15] * 1000 // 24_000 + ((header >> 9) & 1)
