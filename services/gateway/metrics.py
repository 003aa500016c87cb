"""The gateway's numbers in Prometheus form: its own, those of all jobs, and of models that run in its process.

One registry per application.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from shared.schemas.exchange import Result
from shared.tallies import TALLIES, counts

RTF = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Tallied(Collector):
    """What models of this process count (shared.tallies); nothing where they run elsewhere."""

    def collect(self) -> Iterator[CounterMetricFamily]:
        for tally in TALLIES:
            family = CounterMetricFamily(tally.name.replace(".", "_"), tally.meaning, labels=[tally.label])
            for value, count in counts(tally).items():
                family.add_metric([value], count)
            yield family


class Metrics:
    """Counters and histograms of one gateway."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "editx_http_requests", "Requests answered", ["method", "route", "status"], registry=self.registry
        )
        self.request_s = Histogram(
            "editx_http_request_seconds", "Until the answer began", ["method", "route"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.accepted = Counter("editx_jobs_accepted", "Jobs accepted", ["lane", "edit"], registry=self.registry)
        self.refused = Counter("editx_refused", "Calls refused by quota or load", ["reason"], registry=self.registry)
        self.backlog = Gauge("editx_backlog_steps", "Steps waiting or running", ["lane"], registry=self.registry)
        self.listeners = Gauge("editx_event_listeners", "Open event streams and waits", registry=self.registry)
        self.first_audio_s = Histogram(
            "editx_first_audio_seconds", "Until the first audio of a speech answer",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.speech_s = Counter("editx_speech_audio_seconds", "Seconds of speech answered", registry=self.registry)
        self.ended = Counter("editx_jobs_ended", "Jobs that ended", ["state"], registry=self.registry)
        self.dead_letters = Counter("editx_dead_letters", "Jobs given up as dead letters", registry=self.registry)
        self.job_s = Histogram(
            "editx_job_seconds", "From acceptance to the end of a job that is done",
            buckets=(*SECONDS, 300.0, 1_800.0), registry=self.registry,
        )  # fmt: skip
        self.queue_s = Histogram(
            "editx_step_queue_seconds", "From the end of the step before to the first attempt", ["kind"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.step_s = Histogram(
            "editx_step_seconds", "From the first attempt at a step to its end", ["kind"],
            buckets=(*SECONDS, 300.0), registry=self.registry,
        )  # fmt: skip
        self.rtf = Histogram(
            "editx_rtf", "Seconds of work per second of audio", ["kind"], buckets=RTF, registry=self.registry
        )
        self.retries = Counter("editx_step_retries", "Attempts beyond the first", ["kind"], registry=self.registry)
        self.tokens_per_s = Histogram(
            "editx_tokens_per_second", "Audio tokens generated per second of a step",
            buckets=(10, 30, 100, 300, 1_000, 3_000, 10_000), registry=self.registry,
        )  # fmt: skip
        self.webhooks = Counter("editx_webhooks", "Webhook attempts", ["outcome"], registry=self.registry)
        self.registry.register(Tallied())

    def count(self, result: Result) -> None:
        """Take in how a job ended and what its steps took."""
        self.ended.labels(result.state).inc()
        if result.error is not None and result.error.dead_letter:
            self.dead_letters.inc()
        if result.state == "done":
            self.job_s.observe(max(result.finished_at - result.created_at, 0.0))
        before = result.created_at
        for step in result.timings:
            seconds = max(step.finished_at - step.started_at, 0.0)
            self.queue_s.labels(step.kind).observe(max(step.started_at - before, 0.0))
            self.step_s.labels(step.kind).observe(seconds)
            self.retries.labels(step.kind).inc(step.attempts - 1)
            if (rtf := step.metrics.get("rtf")) is not None:
                self.rtf.labels(step.kind).observe(rtf)
            if seconds and (tokens := step.metrics.get("tokens")):
                self.tokens_per_s.observe(tokens / seconds)
            before = step.finished_at

    def text(self) -> bytes:
        """Everything in the exposition format, the process's own numbers included."""
        return generate_latest(self.registry) + generate_latest(REGISTRY)
