"""What clients send and get, as JSON. Knows nothing about HTTP."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, model_validator

from shared.recordings import UPLOAD_ID
from shared.schemas import DecodeSettings, Edit, EditType, GenerateSettings, JobRequest, Lane
from shared.schemas.request import SEED_MAX, AudioFormat

EDIT_EXAMPLE: dict[str, JsonValue] = {
    "type": "emotion",
    "detail": "happy",
    "text": "You know, I just finished that big project.",
    "upload_id": "upl_00112233445566778899aabbccddeeff",
}
SPEECH_EXAMPLE: dict[str, JsonValue] = {
    "model": "nano",
    "input": "Good morning [Laughter] and welcome.",
    "voice": "voice_00112233445566778899aabb",
    "response_format": "wav",
}
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=64)]
Said = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=4096)]


class Recording(BaseModel):
    """Where a recording comes from: exactly one of these. A form sends the file itself as the part `audio`."""

    model_config = ConfigDict(extra="forbid")

    audio: str | None = Field(default=None, description="The file's bytes in base64, or as a form's part.")
    upload_id: str | None = Field(default=None, pattern=UPLOAD_ID, description="Of a finished POST /v1/uploads.")
    voice: str | None = Field(default=None, max_length=64, description="A stored voice: its id or its name.")


class EditBody(Recording):
    """One edit, or a clone, of one recording."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EDIT_EXAMPLE]})

    type: EditType
    detail: str | None = Field(default=None, max_length=64, description="The tag: see /v1/edits/options.")
    target_text: str | None = Field(
        default=None, max_length=4096, description="The words to say (clone, paralinguistic)."
    )
    text: str | None = Field(
        default=None,
        max_length=4096,
        description="What the recording says; a stored voice knows it. Not for denoise, vad.",
    )
    iterations: int = Field(default=1, ge=1, le=10, description="How often the edit is applied to its own result.")
    n_best: int = Field(default=1, ge=1, le=32, description="Candidates per iteration; the reward model picks one.")
    seed: int | None = Field(default=None, ge=0, le=SEED_MAX, description="Drawn if it is left out.")
    generate: GenerateSettings = Field(default_factory=GenerateSettings)
    decode: DecodeSettings = Field(default_factory=DecodeSettings)
    trim_before_mel: bool | None = Field(
        default=None, description="Cut silence from the reference mel too; left out, the checkpoint decides."
    )
    format: AudioFormat = "wav"
    lane: Lane = "interactive"
    timeout_s: float | None = Field(default=None, gt=0.0, le=86_400.0)
    webhook_url: str | None = Field(default=None, max_length=2048, description="Told once the job has ended.")


class BatchBody(BaseModel):
    """Many edits at once, by uploads, voices or base64. They share the batch lane unless they name another."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"edits": [EDIT_EXAMPLE]}]})

    edits: list[EditBody] = Field(min_length=1, max_length=1000)


class UploadBody(BaseModel):
    """An upload to come."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"bytes": 480_044}]})

    bytes: int | None = Field(default=None, ge=1, description="Its size, to learn at once whether it is too large.")


class Upload(BaseModel):
    """PUT the file's bytes to `url`, then name `id` in an edit."""

    id: str
    object: Literal["upload"] = "upload"
    method: Literal["PUT"] = "PUT"
    url: str
    url_expires_at: float
    expires_at: float
    max_bytes: int


class VoiceBody(Recording):
    """A voice to store: a reference recording, what it says, and the consent of the person who speaks."""

    name: Name
    text: Said = Field(description="What the recording says.")
    consent_statement: str | None = Field(
        default=None, max_length=2000, description="An attestation that the speaker agreed, in your words."
    )
    consent_by: str | None = Field(default=None, max_length=200, description="Who attests it.")
    consent_recording: str | None = Field(
        default=None, description="The speaker's own words of consent: base64, or a form's part."
    )

    @model_validator(mode="after")
    def _consented(self) -> Self:
        attested = bool((self.consent_statement or "").strip() and (self.consent_by or "").strip())
        if not attested and self.consent_recording is None:
            raise ValueError("needs consent: consent_recording, or consent_statement with consent_by")
        if self.voice is not None:
            raise ValueError("a voice is made of a recording, not of another voice")
        return self


class VoiceId(BaseModel):
    """A voice by its id, as OpenAI's clients send it."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(max_length=64)


class SpeechBody(BaseModel):
    """OpenAI's speech request. `voice` is a stored voice, or `reference_audio` with `reference_text` gives one."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [SPEECH_EXAMPLE]})

    model: str = Field(default="nano", max_length=128, description="One of /v1/models.")
    input: Said = Field(description="The words to say, with sounds such as [Laughter] between them.")
    voice: str | VoiceId | None = None
    reference_audio: str | None = Field(default=None, description="A recording in base64, instead of a voice.")
    reference_upload_id: str | None = Field(default=None, pattern=UPLOAD_ID)
    reference_text: str | None = Field(default=None, max_length=4096, description="What the reference says.")
    instructions: str | None = Field(
        default=None, max_length=4096, description="Not supported: edit the result instead."
    )
    response_format: Literal["mp3", "opus", "flac", "wav", "pcm", "aac"] = Field(
        default="mp3", description="pcm is 16 bit, 24 kHz, mono. aac is not supported."
    )
    speed: float = Field(default=1.0, ge=0.25, le=4.0, description="Only 1.0: use an edit of type speed.")
    stream_format: Literal["audio", "sse"] = "audio"
    seed: int | None = Field(default=None, ge=0, le=SEED_MAX)
    temperature: float | None = Field(
        default=None, ge=0.0, le=2.0, description="By default the checkpoint's, 0.7 where it names none."
    )
    steps: int = Field(default=10, ge=1, le=100, description="Steps of the flow; fewer are faster.")

    @model_validator(mode="after")
    def _one_voice(self) -> Self:
        given = [self.voice is not None, self.reference_audio is not None, self.reference_upload_id is not None]
        if sum(given) != 1:
            raise ValueError("needs one of voice, reference_audio and reference_upload_id")
        if self.voice is None and not (self.reference_text or "").strip():
            raise ValueError("a reference needs reference_text: what it says")
        return self

    @property
    def voice_name(self) -> str | None:
        """The voice's id or name."""
        return self.voice.id if isinstance(self.voice, VoiceId) else self.voice


class AudioResult(BaseModel):
    """The audio of one iteration; number 0 is the source."""

    iteration: int
    format: str
    href: str = Field(description="Path at this gateway, with the same key.")
    url: str = Field(description="Presigned: anybody who has it may read it until url_expires_at.")
    url_expires_at: float


class StepReport(BaseModel):
    """A finished step."""

    index: int
    kind: str
    seconds: float
    attempts: int
    metrics: dict[str, float]


class JobProblem(BaseModel):
    """Why a job failed, or why its last attempt did."""

    code: str
    message: str
    hint: str
    retryable: bool


class JobView(BaseModel):
    """A job as its owner sees it. Times are Unix seconds."""

    id: str
    object: Literal["audio.edit"] = "audio.edit"
    status: Literal["accepted", "running", "done", "failed", "cancelled"]
    stage: str | None = Field(description="The kind of step that it is at; null once it has ended.")
    progress: float = Field(ge=0.0, le=1.0)
    note: str
    edit: Edit | None
    text: str | None
    iterations: int
    n_best: int
    seed: int
    format: str
    lane: Lane
    cancel_requested: bool
    created_at: float
    started_at: float | None
    finished_at: float | None
    expires_at: float | None
    audio: list[AudioResult] = Field(description="The iterations that are ready, first to last.")
    steps: list[StepReport]
    error: JobProblem | None
    warnings: list[str]
    trace_id: str | None


class JobList(BaseModel):
    """Some jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[JobView]
    next_cursor: str | None = Field(description="Give it as `cursor` to get the next page; null on the last.")


class BatchView(BaseModel):
    """A batch and how far its jobs are."""

    id: str
    object: Literal["batch"] = "batch"
    status: Literal["running", "done"]
    created_at: float
    counts: dict[str, int] = Field(description="Jobs by status.")
    jobs: list[str] = Field(description="Job ids, in the order of the edits.")


def job_request(body: EditBody, text: str | None, seed: int) -> JobRequest:
    """The request of an edit. Raises pydantic's ValidationError where its parts do not fit together."""
    edit = Edit(type=body.type, detail=body.detail, target_text=body.target_text)
    return JobRequest(
        edit=edit,
        text=text if edit.needs_source_text else None,
        seed=seed,
        **body.model_dump(
            include={"iterations", "n_best", "trim_before_mel", "format", "lane", "timeout_s", "webhook_url"}
        ),
        generate=body.generate,
        decode=body.decode,
    )


def nested(fields: dict[str, str]) -> dict[str, Any]:
    """A form's flat fields as the JSON body has them: `generate.top_k` lies in `generate`. Blank ones are left out."""
    body: dict[str, Any] = {}
    for name, value in fields.items():
        if value == "":
            continue
        group, dot, inner = name.partition(".")
        if not dot:
            body[group] = value
        elif isinstance(body.setdefault(group, {}), dict):
            body[group][inner] = value
    return body
