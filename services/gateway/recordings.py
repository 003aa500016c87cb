"""Recordings that clients send: from a form, from base64, from an upload or from a stored voice, checked before use.

A client never names a path or an artifact key. Sizes are checked before anything is read, durations before anything is
decoded.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
from dataclasses import dataclass

from services.gateway.problems import Unprocessable
from services.gateway.schemas import Recording, Upload
from services.gateway.settings import GatewaySettings
from services.gateway.voices import Voices
from shared.audio.io import Waveform, read_audio
from shared.errors import UserError
from shared.recordings import upload_key, uploaded
from shared.store.port import ArtifactStore


@dataclass(frozen=True)
class Received:
    """A usable recording: the bytes as sent, what they hold, and the words of the voice they came from, if any."""

    data: bytes
    waveform: Waveform
    text: str | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


class Recordings:
    """Finds and checks recordings; every method blocks."""

    def __init__(self, store: ArtifactStore, voices: Voices, settings: GatewaySettings) -> None:
        self._store = store
        self._voices = voices
        self._settings = settings

    def receive(self, owner: str, source: Recording, part: bytes | None = None) -> Received:
        """The recording that a request names, or its form's part. Raises UserError for none, two, or a bad one."""
        named = {"audio": part or source.audio, "upload_id": source.upload_id, "voice": source.voice}
        given = [name for name, value in named.items() if value]
        if len(given) != 1 or (part and source.audio):
            found = " and ".join(given) or "none"
            raise Unprocessable(f"A recording is needed exactly once, as audio, upload_id or voice; found {found}.")
        if source.upload_id:
            return self.check(self.uploaded(owner, source.upload_id), "upload_id")
        if source.voice:
            voice, data = self._voices.reference(owner, source.voice)
            return Received(data, self._read(data, "voice"), voice.text)
        return self.check(part or decoded(source.audio or "", "audio", self._settings.max_bytes), "audio")

    def check(self, data: bytes, name: str) -> Received:
        """Bytes that are a usable recording. Raises UserError naming the field."""
        return Received(data, self._read(data, name))

    def upload(self, owner: str, size: int | None, now: float) -> Upload:
        """A place to put one recording."""
        settings = self._settings
        if size is not None and size > settings.max_bytes:
            raise UserError(f"{size} bytes are more than the {settings.max_bytes} allowed.",
                            "Cut the recording, or send it compressed.", "audio_too_large",
                            http_status=413)  # fmt: skip
        identity = f"upl_{secrets.token_hex(16)}"
        return Upload(
            id=identity,
            url=self._store.presign_put(upload_key(owner, identity), expires_s=settings.url_expires_s),
            url_expires_at=now + settings.url_expires_s,
            expires_at=now + settings.upload_keep_s,
            max_bytes=settings.max_bytes,
        )

    def uploaded(self, owner: str, identity: str) -> bytes:
        """The bytes of a finished upload. Raises UploadNotFound, UserError where it is too large."""
        return uploaded(self._store, owner, identity, self._settings.max_bytes)

    def _read(self, data: bytes, name: str) -> Waveform:
        settings = self._settings
        return read_audio(data, max_duration_s=settings.max_duration_s, max_bytes=settings.max_bytes, name=name)


def decoded(text: str, name: str, max_bytes: int) -> bytes:
    """The bytes in base64, checked for size before they are decoded. Raises UserError."""
    if len(text) > max_bytes * 4 // 3 + 4:
        raise UserError(f"{name} is larger than {max_bytes / 2**20:.0f} MiB.",
                        "Cut it, or send it compressed (FLAC, MP3, Opus).", "audio_too_large",
                        http_status=413)  # fmt: skip
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unprocessable(f"{name} is no base64 ({error}).", [{"field": name, "message": "no base64"}]) from error
