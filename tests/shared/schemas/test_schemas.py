"""What the schemas take, refuse and carry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from shared.errors import PoisonError
from shared.jobs import machine
from shared.schemas import (
    BusMessage,
    Edit,
    Job,
    JobEvent,
    JobRequest,
    TrainingRequest,
    build_route,
    new_job_id,
    topic_for,
)
from shared.schemas.route import LANES


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "emotion"},
        {"type": "style", "detail": "whisper", "target_text": "x"},
        {"type": "denoise", "detail": "much"},
        {"type": "clone"},
        {"type": "clone", "target_text": "  "},
        {"type": "paralinguistic", "detail": "Laughter", "target_text": "x"},
        {"type": "speed", "detail": "remove"},
        {"type": "pitch", "detail": "higher"},
        {"type": "vad", "strength": 2},
    ],
)
def test_an_edit_with_fields_that_do_not_fit_its_type_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Edit.model_validate(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"edit": {"type": "denoise"}, "training": {"recipe": "sft"}},
        {"edit": {"type": "emotion", "detail": "happy"}},
        {"edit": {"type": "emotion", "detail": "happy"}, "text": " "},
        {"edit": {"type": "clone", "target_text": "x"}, "text": "y", "iterations": 2},
        {"edit": {"type": "denoise"}, "iterations": 0},
        {"edit": {"type": "denoise"}, "seed": -1},
    ],
)
def test_a_request_that_does_not_hold_together_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        JobRequest.model_validate(fields)


@given(iterations=st.integers(1, 10), n_best=st.integers(1, 4))
def test_a_route_repeats_its_steps_and_each_reads_what_an_earlier_one_wrote(iterations: int, n_best: int) -> None:
    request = JobRequest(edit=Edit(type="denoise"), iterations=iterations, n_best=n_best, format="mp3")
    route = build_route("job_1", request)
    once = ["tokenize", "generate", *(["score"] if n_best > 1 else []), "decode"]
    assert [step.kind for step in route.steps] == once * iterations
    assert [step.index for step in route.steps] == list(range(len(route)))
    written = {"jobs/job_1/source/audio"}
    for step in route.steps:
        assert set(step.inputs.values()) <= written
        names = {"tokenize": ["tokens.safetensors"], "score": ["generated.safetensors"], "decode": ["audio.wav"]}
        many = [f"candidate-{number}.safetensors" for number in range(n_best)]
        generated = many if n_best > 1 else ["generated.safetensors"]
        written |= {step.output_key("job_1", name) for name in names.get(step.kind, generated)}
    assert len(route.result_keys("job_1")) == iterations
    formats = [step.parameters["format"] for step in route.steps if step.kind == "decode"]
    assert formats == ["wav"] * (iterations - 1) + ["mp3"]


def test_later_iterations_of_a_rewording_edit_start_from_the_new_words() -> None:
    edit = Edit(type="paralinguistic", target_text="Well [Laughter] yes.")
    route = build_route("job_1", JobRequest(edit=edit, text="Well yes.", iterations=2, seed=7))
    generates = [step for step in route.steps if step.kind == "generate"]
    assert [step.parameters["text"] for step in generates] == ["Well yes.", "Well [Laughter] yes."]
    assert [step.parameters["seed"] for step in generates] == [7, 8]


def test_a_training_job_has_a_route_of_its_own() -> None:
    request = JobRequest(training=TrainingRequest(recipe="sft", settings={"lr": 1e-5}), lane="batch")
    [step] = build_route("job_1", request).steps
    assert (step.kind, step.parameters["recipe"]) == ("train", "sft")
    assert topic_for(step.kind, request.lane) == "editx.train.batch"


def test_a_stored_voice_is_read_from_its_own_key() -> None:
    request = JobRequest(edit=Edit(type="clone", target_text="Hi."), text="Hello.", source_key="voices/ann/reference")
    assert build_route("job_1", request).steps[0].inputs == {"audio": "voices/ann/reference"}


def test_a_job_survives_its_json_form() -> None:
    job = machine.accept(JobRequest(edit=Edit(type="denoise"), timeout_s=5.0), 1.0, trace={"traceparent": "x"}).job
    held = machine.acquire(job, 0, "worker", 10.0, 2.0).job
    assert Job.model_validate_json(held.model_dump_json()) == held


def test_a_message_survives_the_bus_with_its_trace() -> None:
    job = machine.accept(JobRequest(edit=Edit(type="denoise"), lane="batch"), 1.0).job
    message = BusMessage.for_step(job, {"traceparent": "00-1-2-01", "baggage": "a=b"})
    key, value, headers = message.to_record()
    assert (key, message.topic) == (job.id, "editx.tokenize.batch")
    assert dict(headers)["schema-version"] == b"1"
    assert BusMessage.from_record(value, headers) == message


@given(value=st.binary(max_size=200))
def test_bytes_that_are_no_message_are_poison(value: bytes) -> None:
    with pytest.raises(PoisonError):
        BusMessage.from_record(value, ())


def test_a_message_of_a_later_version_is_poison() -> None:
    _, value, headers = BusMessage(job_id="job_1", step_index=0, kind="decode").to_record()
    with pytest.raises(PoisonError, match="schema_version"):
        BusMessage.from_record(value.replace(b'"schema_version":1', b'"schema_version":2'), headers)


@pytest.mark.parametrize("model", [Edit, JobRequest, Job, JobEvent, BusMessage])
def test_every_schema_has_a_json_schema_in_which_fields_are_named(model: type[BaseModel]) -> None:
    assert model.model_json_schema()["properties"]


def test_job_ids_are_unique_and_sort_by_time() -> None:
    ids = [new_job_id() for _ in range(100)]
    assert len(set(ids)) == 100
    assert [job_id[:16] for job_id in ids] == sorted(job_id[:16] for job_id in ids)


def test_every_kind_has_a_topic_per_lane() -> None:
    assert [topic_for("generate", lane) for lane in LANES] == ["editx.generate", "editx.generate.batch"]
