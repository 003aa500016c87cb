"""/v1/audio/voices: stored voices, each with the consent of its speaker."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, JsonValue

from services.gateway import bodies, openapi
from services.gateway.dependencies import Caller, GatewayOf, PayingCaller
from services.gateway.problems import responses
from services.gateway.recordings import decoded
from services.gateway.schemas import VoiceBody
from services.gateway.threads import blocking
from services.gateway.voices import NewVoice
from shared.recordings import Voice

router = APIRouter(prefix="/v1/audio/voices", tags=["voices"])
EXAMPLE: dict[str, JsonValue] = {
    "name": "Ada",
    "text": "What the reference recording says.",
    "upload_id": "upl_00112233445566778899aabbccddeeff",
    "consent_statement": "I am the speaker and agree to have my voice cloned.",
    "consent_by": "Ada L.",
}


class VoiceList(BaseModel):
    """All voices of a caller, by name."""

    object: Literal["list"] = "list"
    data: list[Voice]


@router.post(
    "",
    status_code=201,
    responses=responses(400, 401, 404, 409, 413, 415, 422, 429, 503),
    openapi_extra=openapi.body(VoiceBody, EXAMPLE, "audio", "consent_recording"),
)
async def create_voice(request: Request, gateway: GatewayOf, principal: PayingCaller) -> Voice:
    """Store a voice: a reference recording, what it says, and consent as a recording or as an attestation."""
    sent = await bodies.read(request, gateway.settings.max_bytes)
    recorded = sent.files.get("consent_recording")
    if recorded is not None:
        sent.values.setdefault("consent_recording", "")
    body = sent.as_model(VoiceBody, "audio", "consent_recording")
    received = await blocking(gateway.recordings.receive, principal.id, body, sent.files.get("audio"))
    if recorded is None and body.consent_recording is not None:
        recorded = decoded(body.consent_recording, "consent_recording", gateway.settings.max_bytes)
    if recorded is not None:
        recorded = (await blocking(gateway.recordings.check, recorded, "consent_recording")).data
    new = NewVoice(body, received.data, received.waveform.duration_s, recorded)
    return await blocking(gateway.voices.add, principal.id, new, gateway.backend.jobs.now())


@router.get("", responses=responses(401, 503))
async def list_voices(gateway: GatewayOf, principal: Caller) -> VoiceList:
    """Your voices."""
    return VoiceList(data=await blocking(gateway.voices.list, principal.id))


@router.get("/{voice_id}", responses=responses(401, 404, 503))
async def get_voice(voice_id: str, gateway: GatewayOf, principal: Caller) -> Voice:
    """One voice, by id or name."""
    return await blocking(gateway.voices.get, principal.id, voice_id)


@router.delete("/{voice_id}", status_code=204, responses=responses(401, 404, 503))
async def delete_voice(voice_id: str, gateway: GatewayOf, principal: Caller) -> Response:
    """Delete a voice, its recording and its consent."""
    await blocking(gateway.voices.remove, principal.id, voice_id)
    return Response(status_code=204)
