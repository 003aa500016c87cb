"""The whole constellation: an edit over Kafka or HTTP comes back as audio, with one trace, whatever is restarted."""

from __future__ import annotations

import base64
import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile as sf

from editx.stack.stack import BUCKET, Stack
from editx.trace import lines, read_spans, trees
from services.decoder.model import DecoderModel
from services.llm.model import LlmModel
from services.reward.model import RewardModel
from services.tokenizer.model import TokenizerModel
from shared.bus.kafka import KafkaBus
from shared.bus.port import Subscription
from shared.checkpoints.layout import Checkpoint
from shared.deadletters import dead_letters
from shared.inference.port import InferenceRequest
from shared.inference.triton import connect
from shared.schemas.exchange import RESULTS, SUBMISSIONS, Result
from shared.topology import EXPIRE_DAYS, EXPIRING

PATIENCE_S = 60.0
SHORT = {"max_duration_s": 1.2}


@pytest.fixture(scope="module")
def recording() -> bytes:
    samples, rate = sf.read(Path(__file__).parents[1] / "data/audio/en_happy_prompt.wav")
    file = io.BytesIO()
    sf.write(file, samples[: 3 * rate], rate, format="FLAC")
    return file.getvalue()


class Client:
    """A system that submits over Kafka and collects results."""

    def __init__(self, bus: KafkaBus, reader: Subscription, recording: bytes) -> None:
        self.bus = bus
        self.reader = reader
        self.results: dict[str, Result] = {}
        self._audio = base64.b64encode(recording).decode()

    def submit(self, name: str, **changes: object) -> None:
        request = {"edit": {"type": "emotion", "detail": "happy"}, "text": "you know", "generate": SHORT, **changes}
        document = {"submission_id": name, "request": request, "audio": self._audio}
        self.bus.publish(SUBMISSIONS, name, json.dumps(document).encode())

    def result(self, name: str) -> Result:
        until = time.monotonic() + PATIENCE_S
        while name not in self.results:
            assert time.monotonic() < until, f"no result for {name}"
            for record in self.reader.poll(0.2, max_records=50):
                result = Result.model_validate_json(record.value)
                if result.state != "accepted":
                    self.results[result.submission_id] = result
        return self.results[name]


@pytest.fixture(scope="module")
def client(stack: Stack, recording: bytes) -> Iterator[Client]:
    bus = stack.bus()
    reader = bus.subscribe([RESULTS], "test-client")
    yield Client(bus, reader, recording)
    bus.close()


def audio_of(stack: Stack, key: str) -> np.ndarray:
    samples, rate = sf.read(io.BytesIO(stack.store().get(key)))
    assert rate == 24_000
    return samples


def test_an_edit_over_kafka_comes_back_as_audio(stack: Stack, client: Client) -> None:
    client.submit("plain")
    result = client.result("plain")
    assert (result.state, result.error) == ("done", None)
    samples = audio_of(stack, result.result_keys[0])
    assert 0.1 < len(samples) / 24_000 <= 1.5
    assert np.isfinite(samples).all()
    assert [timing.kind for timing in result.timings] == ["tokenize", "generate", "decode"]


def test_the_documented_example_runs_as_it_stands(stack: Stack, recording: bytes, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/messages/README.md").read_text()
    example = text.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "recording.wav").write_bytes(recording)
    broker = f"127.0.0.1:{stack.server_ports['broker']}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", example.replace("localhost:18011", broker)],
        cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    states = [line.split()[0] for line in done.stdout.splitlines()]
    assert states == ["accepted", "done"], done.stdout + done.stderr


def test_iterations_give_one_recording_each(stack: Stack, client: Client) -> None:
    client.submit("iterated", iterations=2)
    result = client.result("iterated")
    assert result.state == "done"
    assert len(result.result_keys) == 2
    assert not np.array_equal(*(audio_of(stack, key)[:4800] for key in result.result_keys))


def test_one_trace_spans_all_services_and_the_models(stack: Stack, client: Client) -> None:
    client.submit("traced")
    job_id = client.result("traced").job_id
    until = time.monotonic() + 10.0
    wanted = ["process editx.submissions", "process editx.tokenize", "triton tokenizer", "process editx.generate",
              "triton llm", "process editx.decode", "triton decoder", "send editx.results"]  # fmt: skip
    while True:
        roots = trees(read_spans(stack.spans_file), job_id)
        text = "\n".join(lines(roots))
        if all(name in text for name in wanted) or time.monotonic() > until:
            break
        time.sleep(0.2)
    assert [name for name in wanted if name not in text] == []
    systems = {span["attributes"].get("messaging.system") for span in read_spans(stack.spans_file)
               if span["kind"] in ("PRODUCER", "CONSUMER")}  # fmt: skip
    assert systems == {"kafka"}
    assert len(roots) == 1, text


def test_an_edit_over_http_comes_back_as_audio(stack: Stack, recording: bytes) -> None:
    with httpx.Client(base_url=stack.urls["EDITX_PUBLIC_URL"], timeout=PATIENCE_S) as http:
        body = {"type": "emotion", "detail": "happy", "text": "you know", "seed": "3"}
        answer = http.post(
            "/v1/audio/edits",
            data=body,
            files={"audio": ("a.flac", recording, "audio/flac")},
            headers={"Prefer": "wait=50"},
        )
        assert answer.status_code in (200, 201, 202), answer.text
        job = answer.json()
        assert job["status"] == "done", job
    until = time.monotonic() + 10.0
    while "send editx.results" not in (text := "\n".join(lines(trees(read_spans(stack.spans_file), job["id"])))):
        assert time.monotonic() < until, text
        time.sleep(0.2)
    assert len(trees(read_spans(stack.spans_file), job["id"])) == 1, text
    assert text.count("POST") == 1, text


def test_speech_streams_to_its_end(stack: Stack, recording: bytes) -> None:
    body = {
        "model": "editx",
        "input": "you know",
        "reference_audio": base64.b64encode(recording).decode(),
        "reference_text": "you know",
        "response_format": "pcm",
        "seed": 3,
        "steps": 2,
    }
    with httpx.Client(base_url=stack.urls["EDITX_PUBLIC_URL"], timeout=PATIENCE_S) as http:
        answer = http.post("/v1/audio/speech", json=body)  # raises where the answer breaks off
    assert answer.status_code == 200, answer.text
    assert len(answer.content) > 2 * 2_400


def test_the_models_give_the_same_numbers_behind_triton_and_in_process(stack: Stack, tiny: Path) -> None:
    samples, rate = sf.read(Path(__file__).parents[1] / "data/audio/whisper_prompt.wav", dtype="float32")
    audio, parameters = samples[: 2 * rate], {"sample_rate_hz": rate}
    checkpoint, inference = Checkpoint.resolve(str(tiny)), connect(stack.urls["EDITX_INFERENCE_URL"])
    try:
        here = TokenizerModel(checkpoint).infer([InferenceRequest({"audio": audio}, parameters)])[0]
        there = inference.infer("tokenizer", {"audio": audio}, parameters=parameters)
        assert isinstance(here, dict)
        for name in ("linguistic", "semantic"):
            np.testing.assert_array_equal(there[name], here[name])
        for name in ("speaker_embedding", "prompt_mel"):
            np.testing.assert_allclose(there[name], here[name], atol=2e-3)
        mixed = np.tile(np.array([5, 9, 1030, 1040, 1050], np.int32), 6)
        call = {
            "mixed": mixed,
            "prompt_mixed": mixed,
            "prompt_mel": here["prompt_mel"],
            "speaker_embedding": here["speaker_embedding"],
        }
        decoded = DecoderModel(checkpoint).infer([InferenceRequest(call, {"steps": 2, "seed": 1})])[0]
        assert isinstance(decoded, dict)
        served = inference.infer("decoder", call, parameters={"steps": 2, "seed": 1})
        np.testing.assert_allclose(served["audio"], decoded["audio"], atol=2e-3)
        streamed = [piece["audio"] for piece in inference.stream("decoder", call, parameters={"steps": 2, "seed": 1})]
        assert sum(map(len, streamed)) == len(served["audio"])
        prompt = {"prompt": np.arange(20, 60, dtype=np.int64)}
        written = {"max_groups": 4, "seed": 7}
        whole = inference.infer("llm", prompt, parameters=written)["mixed"]
        again = inference.infer("llm", prompt, parameters=written)["mixed"]
        np.testing.assert_array_equal(whole, again)
        language = LlmModel(checkpoint)
        try:
            inside = language.infer([InferenceRequest(prompt, written)])[0]
        finally:
            language.close()
        assert isinstance(inside, dict)
        np.testing.assert_array_equal(whole, inside["mixed"])
        answer = {**prompt, "mixed": mixed}
        judged = RewardModel(Checkpoint.resolve(stack.options.checkpoint)).infer([InferenceRequest(answer, {})])[0]
        assert isinstance(judged, dict)
        scored = inference.infer("reward", answer)
        for name in ("scores", "score"):
            np.testing.assert_allclose(scored[name], judged[name], atol=1e-4)
    finally:
        inference.close()


def test_a_model_is_loaded_anew_while_calls_go_on(stack: Stack) -> None:
    inference = connect(stack.urls["EDITX_INFERENCE_URL"])
    failures: list[Exception] = []
    stop, served = threading.Event(), [0]
    audio = {"audio": np.sin(np.arange(16_000, dtype=np.float32) / 20) / 2}

    def call() -> None:
        while not stop.is_set():
            try:
                inference.infer("tokenizer", audio, parameters={"sample_rate_hz": 16_000})
                served[0] += 1
            except Exception as error:
                failures.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    try:
        before = served[0]
        inference.load("tokenizer")
        assert {model["name"]: model["state"] for model in inference.models()}["tokenizer"] == "READY"
        time.sleep(0.5)
    finally:
        stop.set()
        caller.join(timeout=30)
    assert failures == []
    assert served[0] > before
    inference.close()


def test_a_worker_that_is_killed_in_the_middle_loses_no_job(stack: Stack, client: Client) -> None:
    names = [f"killed-{number}" for number in range(4)]
    for name in names:
        client.submit(name, generate={"max_duration_s": 3.0})
    until = time.monotonic() + PATIENCE_S
    jobs = stack.jobs()
    while not any(job.lease is not None and job.step.kind == "generate" for job in jobs.list(limit=20).jobs):
        assert time.monotonic() < until
        time.sleep(0.01)
    stack.signal("llm-0", signal.SIGKILL)
    stack.restart("llm-0", kill=True)
    assert [client.result(name).state for name in names] == ["done"] * 4
    jobs.close()


def test_what_cannot_be_read_is_put_aside_and_the_rest_goes_on(stack: Stack, client: Client) -> None:
    client.bus.publish("editx.generate", "job_x", b"{broken")
    client.bus.publish(SUBMISSIONS, "x", b"\x00\x01")
    client.submit("after-poison")
    assert client.result("after-poison").state == "done"
    origins = [letter.document()["origin"]["topic"] for letter in dead_letters(client.bus)]
    assert {"editx.generate", SUBMISSIONS} <= set(origins)


def test_a_broker_and_a_redis_that_restart_lose_nothing(stack: Stack, client: Client) -> None:
    for number in range(3):
        client.submit(f"restarted-{number}")
    stack.restart("broker", kill=True)
    stack.restart("redis", kill=True)
    assert [client.result(f"restarted-{number}").state for number in range(3)] == ["done"] * 3


def test_what_is_left_behind_expires_by_the_buckets_own_policy(stack: Stack) -> None:
    rules = stack.store()._client.get_bucket_lifecycle(bucket_name=BUCKET).rules
    assert {rule.rule_filter.prefix: rule.expiration.days for rule in rules} == dict.fromkeys(EXPIRING, EXPIRE_DAYS)


def test_a_triton_that_is_away_for_a_while_costs_no_attempt(stack: Stack, client: Client) -> None:
    """One job is at work as Triton dies, others come while it is away."""
    client.submit("outage-0", generate={"max_duration_s": 3.0})
    jobs, until = stack.jobs(), time.monotonic() + PATIENCE_S
    while not any(job.lease is not None and job.step.kind == "generate" for job in jobs.list(limit=5).jobs):
        assert time.monotonic() < until
        time.sleep(0.01)
    stack.signal("triton", signal.SIGKILL)
    for number in (1, 2):
        client.submit(f"outage-{number}")
    time.sleep(8.0)
    stack.restart("triton", kill=True)
    results = [client.result(f"outage-{number}") for number in range(3)]
    assert [result.state for result in results] == ["done"] * 3
    assert {timing.attempts for result in results for timing in result.timings} == {1}
    assert "no job is taken until they are back" in stack.log("llm-0").read_text()
    jobs.close()


def test_every_process_is_seen_and_ends_by_itself_when_asked(stack: Stack) -> None:
    assert set(stack.status().values()) == {"running"}
    assert set(Stack(stack.folder).status()) == set(stack.names())
