"""One trace per job, and logs that name the job."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

from shared import telemetry

ROOT = Path(__file__).resolve().parents[2]

SCENE = """
import sys, threading, time
from pathlib import Path
from shared import telemetry
end = telemetry.configure("test", spans_file=Path(sys.argv[1]))
from shared.bus.memory import MemoryBus
from shared.errors import TransientError
from shared.jobs import machine
from shared.jobs.memory import MemoryJobStore
from shared.publishing import publish_step
from shared.retry import RetryPolicy
from shared.schemas import Edit, JobRequest
from shared.store.folder import FolderStore
from shared.worker import Worker, WorkerSettings

class Handler:
    def __init__(self, kind):
        self.kind, self.runs = kind, 0
    def run(self, step):
        self.runs += 1
        if self.kind == "generate" and self.runs == 1:
            raise TransientError("away for now")
        step.write("out", b"x")

bus, jobs, store = MemoryBus(), MemoryJobStore(), FolderStore(Path(sys.argv[1]).parent / "store")
settings = WorkerSettings(group="test", poll_s=0.02, retry=RetryPolicy(base_s=0.01))
workers = [Worker(Handler(kind), bus, store, jobs, settings) for kind in ("tokenize", "generate", "decode")]
threads = [threading.Thread(target=worker.run) for worker in workers]
for thread in threads: thread.start()
with telemetry.span("POST /v1/audio/edits"):
    accepted = machine.accept(JobRequest(edit=Edit(type="denoise")), jobs.now(), trace=telemetry.inject())
    job = publish_step(bus, jobs, jobs.create(accepted.job, accepted.events).job)
while not jobs.get(job.id).is_terminal: time.sleep(0.01)
for worker in workers: worker.stop()
for thread in threads: thread.join()
end()
print(job.id)
"""


def test_a_job_is_one_trace_from_its_request_to_its_last_step(tmp_path: Path) -> None:
    spans_file = tmp_path / "spans.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", SCENE, str(spans_file)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    spans = [json.loads(line) for line in spans_file.read_text().splitlines()]
    by_id = {span["span_id"]: span for span in spans}
    assert len({span["trace_id"] for span in spans}) == 1
    assert [span["name"] for span in spans if span["parent_id"] is None] == ["POST /v1/audio/edits"]
    assert all(span["parent_id"] in by_id for span in spans if span["parent_id"])
    sent = [span["name"] for span in spans if span["kind"] == "PRODUCER"]
    assert sorted(sent) == [f"send editx.{name}" for name in ("decode", "generate", "results", "tokenize")]
    processed = [span for span in spans if span["kind"] == "CONSUMER"]
    assert [span["name"] for span in processed].count("process editx.generate") == 2
    for span in processed:
        assert by_id[span["parent_id"]]["kind"] == "PRODUCER"
        assert span["links"] == [span["parent_id"]]
        assert span["attributes"]["messaging.message.conversation_id"] == done.stdout.strip()
        assert span["attributes"]["messaging.system"] == "editx"
    attempts = [s["attributes"]["editx.attempt"] for s in processed if s["name"] == "process editx.generate"]
    assert attempts == [1, 2]
    failed = [span for span in processed if span["status"] == "ERROR"]
    assert [span["attributes"]["error.type"] for span in failed] == ["temporarily_unavailable"]


MEASURED = """
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from shared import tallies, telemetry
telemetry.instruments()  # made before there is a provider, as in a process that configures late
reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))
tallies.passed("decoder", 3)
tallies.passed("decoder", 1)
tallies.looked_up("recordings", hits=2, misses=5)
for metric in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics:
    for point in metric.data.data_points:
        print(metric.name, dict(point.attributes), point.value)
"""


def test_batch_sizes_and_cache_hits_go_out_as_counters() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert sorted(done.stdout.splitlines()) == [
        "editx.batch.passes {'model': 'decoder'} 2",
        "editx.batch.rows {'model': 'decoder'} 4",
        "editx.cache.hits {'cache': 'recordings'} 2",
        "editx.cache.misses {'cache': 'recordings'} 5",
    ]


def test_without_configuration_there_is_no_trace_to_send_along() -> None:
    with telemetry.span("nothing"):
        assert telemetry.inject() == {}


def test_a_log_line_is_one_json_object_with_the_job_in_it() -> None:
    record = logging.LogRecord("editx", logging.WARNING, "", 0, "step %d waits", (3,), None)
    with telemetry.log_fields(job_id="job_1"):
        line = json.loads(telemetry.JsonFormatter().format(record))
    assert (line["message"], line["level"], line["job_id"]) == ("step 3 waits", "warning", "job_1")
    assert "job_id" not in json.loads(telemetry.JsonFormatter().format(record))
