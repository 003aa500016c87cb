"""POST /v1/audio/speech: OpenAI's shape, streamed while it is made."""

from __future__ import annotations

import base64
import random
import time
from collections.abc import AsyncIterator

import numpy as np
from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse

from services.gateway import encoding
from services.gateway.dependencies import GatewayOf, PayingCaller
from services.gateway.encoding import CONTENT_TYPES, Encoder
from services.gateway.events import CONTENT_TYPE, HEADERS, sse
from services.gateway.gateway import Gateway
from services.gateway.problems import NotFound, TooMuch, responses
from services.gateway.recordings import Received
from services.gateway.schemas import Recording, SpeechBody
from services.gateway.speech import SAMPLE_RATE_HZ, Samples, Words, speak
from services.gateway.threads import blocking, pulled
from shared.errors import EditxError, UserError
from shared.schemas.request import SEED_MAX

router = APIRouter(prefix="/v1/audio", tags=["speech"])
BINARY = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in CONTENT_TYPES.values()}


@router.post(
    "/speech",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "Audio, or its events",
            "content": {**BINARY, CONTENT_TYPE: {"schema": {"type": "string"}}},
        },
        **responses(400, 401, 404, 409, 413, 422, 429, 500, 503),
    },
)
async def create_speech(body: SpeechBody, gateway: GatewayOf, principal: PayingCaller) -> Response:
    """Say a text with a stored voice, or with a reference.

    The answer streams: its first audio comes before the last of the text is generated (FLAC comes whole). With
    `stream_format: sse` it is events of base64 audio.
    """
    _refuse_what_is_missing(gateway, body)
    encoder = encoding.encoder(body.response_format, SAMPLE_RATE_HZ)
    if gateway.speaking.locked():
        gateway.metrics.refused.labels("speech").inc()
        raise TooMuch("As many speech answers as possible are being made.", "Come again shortly.", "overloaded",
                      retry_after_s=2.0)  # fmt: skip
    began = time.perf_counter()
    await gateway.speaking.acquire()
    try:
        voice = await blocking(_reference, gateway, principal.id, body)
        seed = random.randrange(SEED_MAX) if body.seed is None else body.seed
        text = body.reference_text or voice.text or ""
        words = Words(body.input, voice.waveform, text, seed, body.temperature, body.steps)
        pieces = pulled(speak(gateway.backend, words))
        first = await anext(pieces)  # what fails before the first audio is an ordinary problem
    except BaseException:
        gateway.speaking.release()
        raise
    gateway.metrics.first_audio_s.observe(time.perf_counter() - began)
    spoken = _spoken(gateway, first, pieces)
    if body.stream_format == "sse":
        return StreamingResponse(_events(spoken, encoder), 200, HEADERS, CONTENT_TYPE)
    return StreamingResponse(_audio(spoken, encoder), 200, media_type=CONTENT_TYPES[body.response_format])


def _refuse_what_is_missing(gateway: Gateway, body: SpeechBody) -> None:
    """Raise UserError for parts of OpenAI's request that have no meaning here, rather than ignore them."""
    if body.model not in (gateway.backend.metadata.name, "editx"):
        raise NotFound(f"There is no model {body.model!r}.", "GET /v1/models lists them.", "model_not_found")
    if body.instructions and body.instructions.strip():
        raise UserError("instructions are not supported.", "Edit the result's emotion or style with /v1/audio/edits.",
                        "unsupported_parameter")  # fmt: skip
    if body.speed != 1.0:
        raise UserError("speed is not supported here.", "Edit the result with an edit of type speed.",
                        "unsupported_parameter")  # fmt: skip


def _reference(gateway: Gateway, owner: str, body: SpeechBody) -> Received:
    source = Recording(audio=body.reference_audio, upload_id=body.reference_upload_id, voice=body.voice_name)
    return gateway.recordings.receive(owner, source)


async def _spoken(gateway: Gateway, first: Samples, pieces: AsyncIterator[Samples]) -> AsyncIterator[Samples]:
    """All pieces, counted; gives the place back at the end, however it comes."""
    try:
        yield first
        gateway.metrics.speech_s.inc(len(first) / SAMPLE_RATE_HZ)
        async for piece in pieces:
            gateway.metrics.speech_s.inc(len(piece) / SAMPLE_RATE_HZ)
            yield piece
    finally:
        gateway.speaking.release()
        await pieces.aclose()  # type: ignore[attr-defined]


async def _encoded(pieces: AsyncIterator[Samples], encoder: Encoder) -> AsyncIterator[tuple[bytes, int]]:
    async for piece in pieces:
        yield await blocking(encoder.push, np.ascontiguousarray(piece)), len(piece)
    yield await blocking(encoder.finish), 0


async def _audio(pieces: AsyncIterator[Samples], encoder: Encoder) -> AsyncIterator[bytes]:
    async for data, _ in _encoded(pieces, encoder):
        if data:
            yield data


async def _events(pieces: AsyncIterator[Samples], encoder: Encoder) -> AsyncIterator[bytes]:
    samples = 0
    try:
        async for data, count in _encoded(pieces, encoder):
            samples += count
            if data:
                audio = base64.b64encode(data).decode()
                yield sse("speech.audio.delta", {"type": "speech.audio.delta", "audio": audio})
    except EditxError as error:
        yield sse("error", {"type": "error", "error": error.document()})
        return
    usage = {"audio_seconds": round(samples / SAMPLE_RATE_HZ, 3)}
    yield sse("speech.audio.done", {"type": "speech.audio.done", "usage": usage})
