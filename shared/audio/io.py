"""Recordings in and out: bytes, files and streams to mono samples and back, with limits that hold before decoding.

Reads WAV, FLAC, MP3, OGG Vorbis, Opus and AIFF at any rate and channel count that the limits allow. Whatever is wrong
with a recording is a UserError that says what, where and what to do. Knows nothing about models or features and imports
no torch.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile

from shared.errors import UserError
from shared.files import write_atomically

MAX_DURATION_S = 120.0
MIN_DURATION_S = 0.1
MAX_BYTES = 64 * 1024 * 1024
MAX_CHANNELS = 16
MIN_RATE_HZ = 4000
MAX_RATE_HZ = 384_000
SILENCE_SPAN = 2e-4  # a recording whose samples all lie within this range holds nothing

_BLOCK_FRAMES = 1 << 16
_FORMATS = {
    "wav": ("WAV", "PCM_16", None),
    "flac": ("FLAC", "PCM_16", None),
    "mp3": ("MP3", "MPEG_LAYER_III", (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)),
    "opus": ("OGG", "OPUS", (8000, 12000, 16000, 24000, 48000)),
}
FORMATS = tuple(_FORMATS)

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Waveform:
    """Mono samples (n,), float32 in about [-1, 1], and their rate."""

    samples: Samples
    sample_rate_hz: int

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.sample_rate_hz


def read_audio(
    source: str | Path | bytes | BinaryIO,
    *,
    max_duration_s: float = MAX_DURATION_S,
    max_bytes: int = MAX_BYTES,
    name: str = "",
) -> Waveform:
    """Decodes a recording from a path, from bytes or from a binary stream, and downmixes it by the mean.

    `name` is what messages call it. Raises UserError where it is missing, too large, not audio, damaged, of an
    unreasonable rate or channel count, too long, too short, silent, or holds values that are no numbers.
    """
    label = name or (str(source) if isinstance(source, str | Path) else "the recording")
    data = _bytes_of(source, label, max_bytes)
    if not data:
        raise UserError(f"{label} is empty (0 bytes).", "Send a recording with sound in it.", "audio_empty")
    if not _has_known_container(data):
        raise _not_readable(label, "no known container")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_header(file, label, max_duration_s)
            samples, rate = _decode(file, label, max_duration_s), int(file.samplerate)
    except soundfile.LibsndfileError as error:
        raise _not_readable(label, error.error_string.rstrip(".")) from error
    check_samples(samples, rate, label, max_duration_s=max_duration_s)
    return Waveform(samples, rate)


def check_samples(samples: Samples, sample_rate_hz: int, label: str, *, max_duration_s: float = MAX_DURATION_S) -> None:
    """Raises UserError unless (n,) samples are a recording worth processing: finite, audible, of a sensible length."""
    if not MIN_RATE_HZ <= sample_rate_hz <= MAX_RATE_HZ:
        raise UserError(f"{label} has {sample_rate_hz} samples per second.",
                        f"Resample it to a rate from {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz; 24000 is best.",
                        "audio_unsupported")  # fmt: skip
    duration_s = len(samples) / sample_rate_hz
    if duration_s > max_duration_s:
        raise _too_long(label, duration_s, max_duration_s)
    if duration_s < MIN_DURATION_S:
        raise UserError(f"{label} lasts {duration_s:.3f} s.",
                        f"Send at least {MIN_DURATION_S} s; three to ten seconds of speech work best.",
                        "audio_too_short")  # fmt: skip
    if not np.isfinite(samples).all():
        position = int(np.flatnonzero(~np.isfinite(samples))[0])
        raise UserError(f"{label} holds a value that is no number at sample {position}.",
                        "Export it again, as 16-bit WAV if in doubt.", "audio_not_finite")  # fmt: skip
    if float(samples.max()) - float(samples.min()) < SILENCE_SPAN:
        raise UserError(f"{label} is silent for all its {duration_s:.2f} s.",
                        "Check the microphone or the channel, and send a recording with speech in it.",
                        "audio_silent")  # fmt: skip


def write_audio(waveform: Waveform, target: Path | None, fmt: str = "wav") -> bytes | None:
    """Encodes to wav or flac (16 bit), mp3 or opus: to `target`, whole or not at all, or to bytes where it is None.

    Raises UserError for an unknown format, a rate that the format lacks, and a place that cannot be written.
    """
    if fmt not in _FORMATS:
        raise UserError(f"Audio format {fmt!r} is not known.", f"Choose one of {', '.join(FORMATS)}.", "unknown_format")
    container, subtype, rates = _FORMATS[fmt]
    if rates and waveform.sample_rate_hz not in rates:
        raise UserError(f"{fmt} cannot hold {waveform.sample_rate_hz} Hz.",
                        f"Resample to one of {', '.join(map(str, rates))} Hz, or choose wav.",
                        "unsupported_rate")  # fmt: skip
    buffer = io.BytesIO()
    samples = np.clip(waveform.samples, -1.0, 1.0)
    soundfile.write(buffer, samples, waveform.sample_rate_hz, format=container, subtype=subtype)
    if target is None:
        return buffer.getvalue()
    write_atomically(target, buffer.getvalue())
    return None


def _bytes_of(source: str | Path | bytes | BinaryIO, label: str, max_bytes: int) -> bytes:
    if isinstance(source, bytes):
        _check_size(len(source), label, max_bytes)
        return source
    try:
        if not isinstance(source, str | Path):
            data = source.read(max_bytes + 1)
        else:
            path = Path(source)
            if not path.is_file():
                raise UserError(f"{path} is {'a folder' if path.is_dir() else 'not there'}.",
                                "Give the path of an audio file.", "audio_missing")  # fmt: skip
            _check_size(path.stat().st_size, label, max_bytes)
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"{label} cannot be read ({error.strerror or error}).", "Check the path and its permissions.",
                        "audio_missing") from error  # fmt: skip
    _check_size(len(data), label, max_bytes)
    return data


def _check_size(size: int, label: str, max_bytes: int) -> None:
    if size > max_bytes:
        raise UserError(f"{label} is larger than {max_bytes / 2**20:.0f} MiB.",
                        "Cut it, or send it compressed (FLAC, MP3, Opus).", "audio_too_large",
                        http_status=413)  # fmt: skip


def _has_known_container(data: bytes) -> bool:
    """Whether the first bytes are those of a format that is wanted: the decoder knows many more, old and untested."""
    riff = data[:4] in (b"RIFF", b"RF64") and data[8:12] == b"WAVE"
    mp3 = data[:3] == b"ID3" or (data[:1] == b"\xff" and data[1:2] >= b"\xe0")
    return riff or mp3 or data[:4] in (b"fLaC", b"OggS") or (data[:4] == b"FORM" and data[8:12] in (b"AIFF", b"AIFC"))


def _check_header(file: soundfile.SoundFile, label: str, max_duration_s: float) -> None:
    """The limits that a header can break, before anything is decoded or allocated."""
    if not MIN_RATE_HZ <= file.samplerate <= MAX_RATE_HZ:
        raise UserError(f"{label} claims {file.samplerate} samples per second.",
                        f"Resample it to a rate from {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz; 24000 is best.",
                        "audio_unsupported")  # fmt: skip
    if file.channels > MAX_CHANNELS:
        raise UserError(f"{label} has {file.channels} channels.", f"Send at most {MAX_CHANNELS}; mono is best.",
                        "audio_unsupported")  # fmt: skip
    if file.frames / file.samplerate > max_duration_s:
        raise _too_long(label, file.frames / file.samplerate, max_duration_s)


def _decode(file: soundfile.SoundFile, label: str, max_duration_s: float) -> Samples:
    """Mono samples, block by block, so that neither a header's claim nor the channel count decides the memory."""
    limit, decoded, blocks = int(max_duration_s * file.samplerate), 0, []
    while True:
        block = file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)
        if not len(block):
            break
        decoded += len(block)
        if decoded > limit:
            raise _too_long(label, decoded / file.samplerate, max_duration_s)
        with np.errstate(invalid="ignore", over="ignore"):
            blocks.append(block.mean(axis=1, dtype=np.float64).astype(np.float32))
    if not blocks:
        raise UserError(f"{label} holds no samples.", "Send a recording with sound in it.", "audio_empty")
    return np.concatenate(blocks)


def _not_readable(label: str, reason: str) -> UserError:
    return UserError(f"{label} is not audio that can be read ({reason}).",
                     "Send WAV, FLAC, MP3, OGG Vorbis or Opus, complete and undamaged.", "audio_not_readable",
                     http_status=415)  # fmt: skip


def _too_long(label: str, duration_s: float, max_duration_s: float) -> UserError:
    return UserError(f"{label} lasts {duration_s:.1f} s, more than the {max_duration_s:.0f} s allowed.",
                     "Cut it into shorter pieces.", "audio_too_long", http_status=413)  # fmt: skip
