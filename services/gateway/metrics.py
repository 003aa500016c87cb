"""The gateway's own numbers, in Prometheus form. One registry per application."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


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
        self.webhooks = Counter("editx_webhooks", "Webhook attempts", ["outcome"], registry=self.registry)

    def text(self) -> bytes:
        """Everything in the exposition format, the process's own numbers included."""
        return generate_latest(self.registry) + generate_latest(REGISTRY)
