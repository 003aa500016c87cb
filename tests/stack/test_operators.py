"""What operators do with a running system: dead letters, models and traces by the command line."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from editx.cli.app import run
from editx.stack.stack import Stack
from shared.bus.kafka import KafkaBus
from shared.jobs import machine
from shared.jobs.redis import RedisJobStore
from shared.publishing import publish_step
from shared.schemas import Edit, Job, JobRequest, JobState

PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def addresses(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, url in stack.urls.items():
        monkeypatch.setenv(name, url)
    monkeypatch.setenv("EDITX_STACK", str(stack.folder))


@pytest.fixture
def bus(stack: Stack) -> Iterator[KafkaBus]:
    bus = stack.bus()
    yield bus
    bus.close()


@pytest.fixture
def jobs(stack: Stack) -> Iterator[RedisJobStore]:
    jobs = stack.jobs()
    yield jobs
    jobs.close()


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a command writes."""
    capsys.readouterr()
    assert run(list(arguments)) == code
    return capsys.readouterr().out


def letter_of(capsys: pytest.CaptureFixture[str], name: str) -> dict[str, Any]:
    """The newest dead letter whose job or value has `name` in it, once there is one."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        letters = json.loads(said(capsys, "dlq", "list", "--json"))
        found = [letter for letter in letters if name in letter["job_id"] + letter["value"]]
        if found:
            return dict(found[-1])
    raise AssertionError(f"no dead letter of {name}")


def given_up(stack: Stack, bus: KafkaBus, jobs: RedisJobStore) -> Job:
    """A job whose first step is given up: an artifact that it needs is damaged."""
    request = JobRequest(edit=Edit(type="emotion", detail="happy"), text="you know")
    accepted = machine.accept(request, jobs.now())
    job = accepted.job.model_copy(update={"step_index": 1})
    stack.store().put(job.step.inputs["tokens"], b"damaged")
    return publish_step(bus, jobs, jobs.create(job, accepted.events).job)


def test_a_dead_letter_is_listed_and_shown_with_attempts_reason_and_trace(
    stack: Stack, bus: KafkaBus, jobs: RedisJobStore, capsys: pytest.CaptureFixture[str]
) -> None:
    job = given_up(stack, bus, jobs)
    listed = letter_of(capsys, job.id)
    assert listed["id"].startswith("failed/")
    shown = json.loads(said(capsys, "dlq", "show", listed["id"]))
    assert shown == listed
    assert (shown["job_id"], shown["attempt"], shown["origin"]["topic"]) == (job.id, "1", "editx.generate")
    assert "artifact" in shown["reason"]
    assert listed["id"] in said(capsys, "dlq", "list")


def test_a_failed_step_is_replayed_as_a_new_job_and_only_once(
    stack: Stack, bus: KafkaBus, jobs: RedisJobStore, capsys: pytest.CaptureFixture[str]
) -> None:
    job = given_up(stack, bus, jobs)
    letter = letter_of(capsys, job.id)
    first, second = (said(capsys, "dlq", "replay", letter["id"]) for _ in range(2))
    assert first == second
    again = jobs.get(first.split()[-2])
    assert again.id != job.id
    assert again.request.source_key == f"jobs/{job.id}/source/audio"
    assert jobs.get(job.id).state == JobState.FAILED


def test_an_unreadable_message_is_replayed_to_its_topic(bus: KafkaBus, capsys: pytest.CaptureFixture[str]) -> None:
    bus.publish("editx.decode", "x", b"{unreadable-of-operators")
    letter = letter_of(capsys, "unreadable-of-operators")
    assert letter["id"].startswith("unreadable/")
    assert "went back" in said(capsys, "dlq", "replay", letter["id"])
    until = time.monotonic() + PATIENCE_S
    while letter_of(capsys, "unreadable-of-operators")["id"] == letter["id"]:
        assert time.monotonic() < until


def test_a_dead_letter_that_is_not_there_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["dlq", "show", "failed/0/999999"]) == 2
    assert "editx dlq list" in capsys.readouterr().err


def test_models_are_listed_unloaded_and_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    def states() -> dict[str, str]:
        return {model["name"]: model["state"] for model in json.loads(said(capsys, "models", "list", "--json"))}

    assert set(states()) == {"tokenizer", "llm", "decoder", "reward"}
    assert "reward is unloaded" in said(capsys, "models", "unload", "reward")
    until = time.monotonic() + PATIENCE_S
    while states()["reward"] == "READY":
        assert time.monotonic() < until
    assert "reward is loaded" in said(capsys, "models", "load", "reward")
    assert states()["reward"] == "READY"
    assert "reward" in said(capsys, "models", "list")
    assert run(["models", "load", "nothing"]) == 4


def test_the_trace_of_a_job_is_printed_as_a_tree(
    stack: Stack, bus: KafkaBus, jobs: RedisJobStore, capsys: pytest.CaptureFixture[str]
) -> None:
    job = given_up(stack, bus, jobs)
    letter_of(capsys, job.id)
    text = said(capsys, "trace", job.id)
    assert "process editx.generate" in text
    assert "FAILED unreadable_message" in text
    assert run(["trace", "job_nowhere"]) == 2
