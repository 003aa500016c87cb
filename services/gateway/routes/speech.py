"""POST /v1/audio/speech: OpenAI's shape, streamed while it is made."""

from __future__ import annotations

import base64
import itertools
import random
import threading
import time
from collections.abc import Generator, Iterator

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
from services.gateway.streaming import Streamed
from services.gateway.threads import blocking
from shared.errors import EditxError, UserError
from shared.inference.port import InferenceUnavailable, RequestCancelled, UnknownModel
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
    gateway.backend.metadata.check_languages(body.input)
    encoder = encoding.encoder(body.response_format, SAMPLE_RATE_HZ)
    if gateway.speaking.locked():
        gateway.metrics.refused.labels("speech").inc()
        raise TooMuch("As many speech answers as possible are being made.", "Come again shortly.", "overloaded",
                      retry_after_s=2.0)  # fmt: skip
    began, stop = time.perf_counter(), threading.Event()
    await gateway.speaking.acquire()
    try:
        voice = await blocking(_reference, gateway, principal.id, body)
        seed = random.randrange(SEED_MAX) if body.seed is None else body.seed
        text = body.reference_text or voice.text or ""
        words = Words(body.input, voice.waveform, text, seed, body.temperature, body.steps)
        spoken = speak(gateway.backend, words, stop.is_set)
        first = await blocking(next, spoken)  # what fails before the first audio is an ordinary problem
    except BaseException as error:
        stop.set()
        gateway.speaking.release()
        if isinstance(error, UnknownModel):
            raise InferenceUnavailable("No models answer at this gateway.", "Use /v1/audio/edits.") from error
        raise
    gateway.metrics.first_audio_s.observe(time.perf_counter() - began)
    pieces = _counted(gateway, first, spoken)
    if body.stream_format == "sse":
        sent, kind, headers = _events(pieces, encoder), CONTENT_TYPE, HEADERS
    else:
        sent, kind, headers = _audio(pieces, encoder), CONTENT_TYPES[body.response_format], {}
    return Streamed(sent, stop, gateway.speaking.release, media_type=kind, headers=headers)


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


def _counted(gateway: Gateway, first: Samples, rest: Iterator[Samples]) -> Iterator[Samples]:
    for piece in itertools.chain([first], rest):
        gateway.metrics.speech_s.inc(len(piece) / SAMPLE_RATE_HZ)
        yield piece


def _audio(pieces: Iterator[Samples], encoder: Encoder) -> Generator[bytes, None, None]:
    for piece in pieces:
        if data := encoder.push(piece):
            yield data
    if data := encoder.finish():
        yield data


def _events(pieces: Iterator[Samples], encoder: Encoder) -> Generator[bytes, None, None]:
    samples = 0
    try:
        for piece in pieces:
            samples += len(piece)
            if data := encoder.push(piece):
                yield _delta(data)
    except RequestCancelled:
        raise
    except EditxError as error:
        yield sse("error", {"type": "error", "error": error.document()})
        return
    if data := encoder.finish():
        yield _delta(data)
    usage = {"audio_seconds": round(samples / SAMPLE_RATE_HZ, 3)}
    yield sse("speech.audio.done", {"type": "speech.audio.done", "usage": usage})


def _delta(data: bytes) -> bytes:
    return sse("speech.audio.delta", {"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()})
