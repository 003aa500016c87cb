"""Storing and deleting voices: a reference recording, what it says, and the consent of its speaker beside it.

A voice's voice.json is written last and deleted first (shared.recordings).
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

from services.gateway.problems import Conflict
from services.gateway.schemas import VoiceBody
from shared.recordings import CONSENT, MANIFEST, REFERENCE, Consent, StoredVoices, Voice, voice_key


@dataclass(frozen=True)
class NewVoice:
    """What a voice is made of, after the checks."""

    body: VoiceBody
    reference: bytes
    duration_s: float
    consent_recording: bytes | None


class Voices(StoredVoices):
    """The voices of all owners; every method blocks."""

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
        self._store.put(voice_key(owner, identity, REFERENCE), new.reference)
        if recorded is not None:
            self._store.put(voice_key(owner, identity, CONSENT), recorded)
        manifest = voice.model_dump_json().encode()
        self._store.put(voice_key(owner, identity, MANIFEST), manifest, content_type="application/json")
        return voice

    def remove(self, owner: str, name: str) -> None:
        """Delete a voice with its consent, the manifest first. Raises VoiceNotFound."""
        voice = self.get(owner, name)
        self._store.delete(voice_key(owner, voice.id, MANIFEST))
        self._store.delete_prefix(f"voices/{owner}/{voice.id}/")
