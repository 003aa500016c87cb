"""Stored voices: a reference recording, what it says, and the consent of its speaker beside it, in the artifact store.

A voice lies below voices/{owner}/{id}/ and exists once its voice.json is there, which is written last.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass

from services.gateway.problems import Conflict, NotFound
from services.gateway.schemas import Consent, Voice, VoiceBody
from shared.store.port import ArtifactNotFound, ArtifactStore

VOICE_ID = re.compile(r"voice_[0-9a-f]{24}")
REFERENCE, CONSENT, MANIFEST = "reference", "consent", "voice.json"


@dataclass(frozen=True)
class NewVoice:
    """What a voice is made of, after the checks."""

    body: VoiceBody
    reference: bytes
    duration_s: float
    consent_recording: bytes | None


class Voices:
    """The voices of all owners; every method blocks."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def add(self, owner: str, new: NewVoice, now: float) -> Voice:
        """Store a voice. Raises Conflict where the owner has one of this name."""
        if any(voice.name == new.body.name for voice in self.list(owner)):
            raise Conflict(f"You have a voice {new.body.name!r} already.", "Delete it, or take another name.",
                           "voice_exists")  # fmt: skip
        identity = f"voice_{secrets.token_hex(12)}"
        recorded = new.consent_recording
        consent = Consent(
            kind="attestation" if recorded is None else "recording",
            statement=new.body.consent_statement or "",
            by=new.body.consent_by or "",
            given_at=now,
            sha256="" if recorded is None else hashlib.sha256(recorded).hexdigest(),
        )
        voice = Voice(
            id=identity,
            name=new.body.name,
            text=new.body.text,
            duration_s=round(new.duration_s, 3),
            sha256=hashlib.sha256(new.reference).hexdigest(),
            created_at=now,
            consent=consent,
        )
        self._store.put(_key(owner, identity, REFERENCE), new.reference)
        if recorded is not None:
            self._store.put(_key(owner, identity, CONSENT), recorded)
        manifest = voice.model_dump_json().encode()
        self._store.put(_key(owner, identity, MANIFEST), manifest, content_type="application/json")
        return voice

    def list(self, owner: str) -> list[Voice]:
        """An owner's voices, by name."""
        prefix = f"voices/{owner}/"
        keys = [info.key for info in self._store.list(prefix) if info.key.endswith(f"/{MANIFEST}")]
        return sorted((Voice.model_validate_json(self._store.get(key)) for key in keys), key=lambda voice: voice.name)

    def get(self, owner: str, name: str) -> Voice:
        """A voice by its id or its name. Raises NotFound."""
        if VOICE_ID.fullmatch(name):
            try:
                return Voice.model_validate_json(self._store.get(_key(owner, name, MANIFEST)))
            except ArtifactNotFound as error:
                raise _unknown(name) from error
        found = [voice for voice in self.list(owner) if voice.name == name]
        if not found:
            raise _unknown(name)
        return found[0]

    def reference(self, owner: str, name: str) -> tuple[Voice, bytes]:
        """A voice and its recording. Raises NotFound."""
        voice = self.get(owner, name)
        return voice, self._store.get(_key(owner, voice.id, REFERENCE))

    def remove(self, owner: str, name: str) -> None:
        """Delete a voice with its consent, the manifest first. Raises NotFound."""
        voice = self.get(owner, name)
        self._store.delete(_key(owner, voice.id, MANIFEST))
        self._store.delete_prefix(f"voices/{owner}/{voice.id}/")


def _key(owner: str, identity: str, name: str) -> str:
    return f"voices/{owner}/{identity}/{name}"


def _unknown(name: str) -> NotFound:
    return NotFound(f"There is no voice {name!r}.", "GET /v1/audio/voices lists yours.", "voice_not_found")
