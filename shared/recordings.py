"""Recordings that a request may name instead of sending them: uploads, and stored voices with their speakers' consent.

An upload lies below uploads/{owner}/; a voice below voices/{owner}/{id}/, and it exists once its voice.json is there.
Knows nothing about who asks, and never takes a path or an artifact key from a client.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, Field

from shared.audio.io import MAX_BYTES
from shared.errors import UserError
from shared.store.port import ArtifactNotFound, ArtifactStore

UPLOADS = "uploads/"
UPLOAD_ID = r"^upl_[0-9a-f]{32}$"
VOICES = "voices/"
VOICE_ID = re.compile(r"voice_[0-9a-f]{24}")
REFERENCE, CONSENT, MANIFEST = "reference", "consent", "voice.json"


class UploadNotFound(UserError):
    """There is no such upload of this owner, or it has expired."""

    default_code = "upload_not_found"
    default_http_status = 404


class VoiceNotFound(UserError):
    """This owner has no such voice."""

    default_code = "voice_not_found"
    default_http_status = 404


class Consent(BaseModel):
    """What is kept of a voice's consent."""

    kind: Literal["recording", "attestation"]
    statement: str = ""
    by: str = ""
    given_at: float
    sha256: str = Field(default="", description="Of the consent recording.")


class Voice(BaseModel):
    """A stored voice."""

    id: str
    object: Literal["audio.voice"] = "audio.voice"
    name: str
    text: str
    duration_s: float
    sha256: str = Field(description="Of the reference recording.")
    created_at: float
    consent: Consent


class StoredVoices:
    """The voices of all owners, for reading; every method blocks."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def list(self, owner: str) -> list[Voice]:
        """An owner's voices, by name."""
        keys = [info.key for info in self._store.list(f"{VOICES}{owner}/") if info.key.endswith(f"/{MANIFEST}")]
        return sorted((Voice.model_validate_json(self._store.get(key)) for key in keys), key=lambda voice: voice.name)

    def get(self, owner: str, name: str) -> Voice:
        """A voice by its id or its name. Raises VoiceNotFound."""
        if VOICE_ID.fullmatch(name):
            try:
                return Voice.model_validate_json(self._store.get(voice_key(owner, name, MANIFEST)))
            except ArtifactNotFound as error:
                raise _unknown(name) from error
        found = [voice for voice in self.list(owner) if voice.name == name]
        if not found:
            raise _unknown(name)
        return found[0]

    def reference(self, owner: str, name: str) -> tuple[Voice, bytes]:
        """A voice and its recording. Raises VoiceNotFound."""
        voice = self.get(owner, name)
        return voice, self._store.get(voice_key(owner, voice.id, REFERENCE))


def voice_key(owner: str, identity: str, name: str) -> str:
    """Where a part of a voice lies."""
    return f"{VOICES}{owner}/{identity}/{name}"


def upload_key(owner: str, identity: str) -> str:
    """Where an upload lies."""
    return f"{UPLOADS}{owner}/{identity}"


def uploaded(store: ArtifactStore, owner: str, identity: str, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a finished upload. Raises UploadNotFound, or UserError where it is too large: it is removed then."""
    if not re.fullmatch(UPLOAD_ID, identity):
        raise UploadNotFound(f"There is no upload {identity}.")
    key = upload_key(owner, identity)
    try:
        size = store.stat(key).size
        if size > max_bytes:
            store.delete(key)
            raise UserError(f"The upload has {size} bytes, more than the {max_bytes} allowed.",
                            "Cut the recording, or send it compressed.", "audio_too_large",
                            http_status=413)  # fmt: skip
        return store.get(key)
    except ArtifactNotFound as error:
        raise UploadNotFound(
            f"There is no upload {identity}.", "PUT the file to its url first; uploads expire."
        ) from error


def _unknown(name: str) -> VoiceNotFound:
    return VoiceNotFound(f"There is no voice {name!r}.", "GET /v1/audio/voices lists yours.")
