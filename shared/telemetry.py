"""Traces, metrics and logs of every service: one trace per job, carried by W3C headers through the bus.

Without `configure` everything here does nothing and costs next to nothing. Names follow OpenTelemetry's messaging
conventions (semconv 1.44). Knows nothing about jobs beyond their ids.
"""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from opentelemetry import metrics, propagate, trace
from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode

from shared.tallies import TALLIES, Tally, counts

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

SYSTEM_ATTRIBUTE = "messaging.system"
_log_fields: contextvars.ContextVar[Mapping[str, object]] = contextvars.ContextVar(
    "editx_log_fields", default=MappingProxyType({})
)


def tracer() -> trace.Tracer:
    """The tracer of this system; does nothing until `configure`."""
    return trace.get_tracer("editx")


def inject() -> dict[str, str]:
    """The current trace context as W3C headers; empty outside a trace."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier


def extract(headers: Mapping[str, str]) -> Context:
    """The trace context in W3C headers."""
    return propagate.extract(dict(headers))


@contextmanager
def span(
    name: str, attributes: Mapping[str, Any] | None = None, parent: Mapping[str, str] | None = None
) -> Iterator[Span]:
    """A span around some work inside this process; an exception marks it as failed."""
    context = None if parent is None else extract(parent)
    with tracer().start_as_current_span(name, context=context, attributes=attributes) as current:
        yield current


@contextmanager
def sending(topic: str, job_id: str, parent: Mapping[str, str] | None = None, system: str = "editx") -> Iterator[Span]:
    """The span `send {topic}` around publishing one message; `inject` inside it gives the context to send along."""
    attributes = _attributes("send", "send", topic, job_id, system)
    context = extract(parent) if parent and not trace.get_current_span().get_span_context().is_valid else None
    with tracer().start_as_current_span(f"send {topic}", context, SpanKind.PRODUCER, attributes) as current:
        yield current
    instruments().sent.add(1, {"messaging.destination.name": topic})


@contextmanager
def processing(
    topic: str,
    headers: Mapping[str, str],
    *,
    job_id: str,
    group: str,
    partition: int,
    offset: int,
    attempt: int,
    system: str = "editx",
) -> Iterator[Span]:
    """The span `process {topic}` around one message: a child of the sender's span, and linked to it.

    The link keeps the cause visible where several attempts at one message share a parent.
    """
    context = extract(headers)
    creation = trace.get_current_span(context).get_span_context()
    attributes = _attributes("process", "process", topic, job_id, system) | {
        "messaging.consumer.group.name": group,
        "messaging.destination.partition.id": str(partition),
        "messaging.kafka.offset": offset,
        "editx.attempt": attempt,
    }
    links = [Link(creation)] if creation.is_valid else []
    instruments().consumed.add(1, {"messaging.destination.name": topic})
    began = time.perf_counter()
    with (
        tracer().start_as_current_span(f"process {topic}", context, SpanKind.CONSUMER, attributes, links) as current,
        log_fields(job_id=job_id),
    ):
        try:
            yield current
        finally:
            seconds = time.perf_counter() - began
            instruments().processed.record(seconds, {"messaging.destination.name": topic})


def attempted(number: int) -> None:
    """Say on the current span which attempt this is, once that is known: the message tells only of the first."""
    trace.get_current_span().set_attribute("editx.attempt", number)


def failed(error: BaseException, code: str) -> None:
    """Mark the current span as failed."""
    current = trace.get_current_span()
    current.set_attribute("error.type", code)
    current.set_status(Status(StatusCode.ERROR, str(error)))


class Instruments:
    """The counters and histograms of all services."""

    def __init__(self) -> None:
        meter = metrics.get_meter("editx")
        self.sent = meter.create_counter("messaging.client.sent.messages", "{message}")
        self.consumed = meter.create_counter("messaging.client.consumed.messages", "{message}")
        self.processed = meter.create_histogram("messaging.process.duration", "s")
        self.steps = meter.create_histogram("editx.step.duration", "s", "Handler time of one step, by kind and outcome")
        self.outcomes = meter.create_counter("editx.step.outcomes", "{step}", "Steps by kind and outcome")
        self.rtf = meter.create_histogram("editx.rtf", "1", "Processing seconds per second of audio, by step kind")
        self.outages = meter.create_counter("editx.worker.outages", "{outage}", "Times that a worker took no jobs")
        for tally in TALLIES:
            meter.create_observable_counter(tally.name, [_observer(tally)], tally.unit, tally.meaning)


def _observer(tally: Tally) -> Callable[[CallbackOptions], Iterable[Observation]]:
    return lambda _: [Observation(count, {tally.label: value}) for value, count in counts(tally).items()]


_instruments: list[Instruments] = []
_lock = threading.Lock()


def instruments() -> Instruments:
    """The instruments, made once after `configure` had its chance."""
    with _lock:
        if not _instruments:
            _instruments.append(Instruments())
        return _instruments[0]


@contextmanager
def log_fields(**fields: object) -> Iterator[None]:
    """Add fields such as job_id to every log line written inside."""
    reset = _log_fields.set({**_log_fields.get(), **fields})
    try:
        yield
    finally:
        _log_fields.reset(reset)


def current_log_fields() -> dict[str, object]:
    """What `log_fields` adds here and now, for a call to another process."""
    return dict(_log_fields.get())


class JsonFormatter(logging.Formatter):
    """One JSON object per line, with the job's and the trace's ids."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_log_fields.get(),
        }
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            line |= {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure_logs(level: str = "INFO", *, as_json: bool = True) -> None:
    """Send all logs to standard error, as JSON lines or as text for people."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if as_json else text)
    logging.basicConfig(level=level, handlers=[handler], force=True)


def configure(service: str, *, spans_file: Path | None = None, otlp_endpoint: str | None = None) -> Callable[[], None]:
    """Switch traces and metrics on for this process; returns the function that flushes and ends them.

    `spans_file` gets one JSON object per span. `otlp_endpoint` is the base URL of an OTLP/HTTP collector.
    """
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult

    class JsonLinesExporter(SpanExporter):
        """Appends spans to a file; several processes may share it, since every line is one write."""

        def __init__(self, path: Path) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8", buffering=1 << 16)

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            self._file.writelines(f"{json.dumps(span_document(finished), ensure_ascii=False)}\n" for finished in spans)
            self._file.flush()
            return SpanExportResult.SUCCESS

        def shutdown(self) -> None:
            self._file.close()

    resource = Resource.create({"service.name": f"editx-{service}"})
    traces, readers = TracerProvider(resource=resource), list[MetricReader]()
    if spans_file is not None:
        traces.add_span_processor(SimpleSpanProcessor(JsonLinesExporter(spans_file)))
    if otlp_endpoint is not None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        base = otlp_endpoint.rstrip("/")
        traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{base}/v1/traces")))
        readers.append(PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=f"{base}/v1/metrics")))
    meters = MeterProvider(metric_readers=readers, resource=resource)
    trace.set_tracer_provider(traces)
    metrics.set_meter_provider(meters)
    instruments()  # so that what models count goes out although nothing else here is recorded

    def end() -> None:
        traces.shutdown()
        meters.shutdown()

    return end


def span_document(finished: ReadableSpan) -> dict[str, object]:
    """A span as plain data, for the JSON lines file."""
    context, parent = finished.get_span_context(), finished.parent
    return {
        "name": finished.name,
        "kind": finished.kind.name,
        "service": finished.resource.attributes.get("service.name"),
        "trace_id": f"{context.trace_id:032x}" if context else None,
        "span_id": f"{context.span_id:016x}" if context else None,
        "parent_id": f"{parent.span_id:016x}" if parent else None,
        "links": [f"{link.context.span_id:016x}" for link in finished.links],
        "start": (finished.start_time or 0) / 1e9,
        "seconds": ((finished.end_time or 0) - (finished.start_time or 0)) / 1e9,
        "status": finished.status.status_code.name,
        "attributes": dict(finished.attributes or {}),
    }


def _attributes(name: str, kind: str, topic: str, job_id: str, system: str) -> dict[str, Any]:
    return {
        SYSTEM_ATTRIBUTE: system,
        "messaging.operation.name": name,
        "messaging.operation.type": kind,
        "messaging.destination.name": topic,
        "messaging.kafka.message.key": job_id,
        "messaging.message.conversation_id": job_id,
    }
