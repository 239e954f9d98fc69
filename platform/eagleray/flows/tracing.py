"""Sends spans to OpenTelemetry: only where ``OTEL_EXPORTER_OTLP_ENDPOINT`` is set, else nothing is imported or sent.

The settings are OpenTelemetry's own environment variables: endpoint, headers, ``OTEL_SERVICE_NAME``,
``OTEL_RESOURCE_ATTRIBUTES``, ``OTEL_SDK_DISABLED``, ``OTEL_TRACES_SAMPLER``. Spans leave in batches, from a thread of
the exporter; a collector that does not answer costs a log line, never a request.

Example:
    >>> tracer = tracer_from_environment()
    >>> tracer.is_on
    False
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from eagleray.core.errors import CapabilityError, ConfigError
from eagleray.serving.traces import NullTracer, Span, Tracer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
HTTP_PROTOBUF = "http/protobuf"
SAMPLERS = ("parentbased_always_on", "always_on", "always_off", "traceidratio")
SERVICE = "eagleray-serving"
_LOW_BITS = 64  # of the trace id, which TraceIdRatioBased compares: every process decides alike


def tracer_from_environment(environment: Mapping[str, str] | None = None) -> Tracer:
    """What spans go to, by OpenTelemetry's environment variables.

    Args:
        environment: Instead of the process's own.

    Raises:
        ConfigError: A protocol or sampler that is not one of ours.
        CapabilityError: An endpoint is set and the exporter is not installed.
    """
    given = os.environ if environment is None else environment
    is_disabled = given.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if is_disabled or not any(given.get(name, "").strip() for name in ENDPOINTS):
        return NullTracer()
    protocol = next((given[name] for name in PROTOCOLS if given.get(name)), HTTP_PROTOBUF)
    if protocol != HTTP_PROTOBUF:
        raise ConfigError(
            f"{PROTOCOLS[1]}={protocol}",
            expected=HTTP_PROTOBUF,
            fix="set it so, and the endpoint to the collector's HTTP port (4318)",
        )
    ratio = sampling_ratio(given)
    if ratio == 0:
        return NullTracer()
    if find_spec("opentelemetry.exporter") is None or find_spec("opentelemetry.exporter.otlp.proto.http") is None:
        raise CapabilityError(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set and OpenTelemetry's exporter is not installed",
            expected="opentelemetry-exporter-otlp-proto-http",
            fix='pip install "eagleray[otel]" -c constraints.txt, or unset the variable',
        )
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return OpenTelemetryTracer(BatchSpanProcessor(OTLPSpanExporter()), ratio=ratio)


def sampling_ratio(environment: Mapping[str, str]) -> float:
    """The share of traces to keep, 0..1, by OTEL_TRACES_SAMPLER and its _ARG; a caller's own decision comes before.

    Raises:
        ConfigError: A sampler that is not one of SAMPLERS, or an argument that is no share.
    """
    sampler = environment.get("OTEL_TRACES_SAMPLER") or SAMPLERS[0]
    text = environment.get("OTEL_TRACES_SAMPLER_ARG") or "1.0"
    if sampler not in SAMPLERS:
        raise ConfigError(f"OTEL_TRACES_SAMPLER={sampler}", expected=f"one of {', '.join(SAMPLERS)}", fix="set one")
    if sampler != "traceidratio":
        return 0.0 if sampler == "always_off" else 1.0
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise ConfigError(f"OTEL_TRACES_SAMPLER_ARG={text}", expected="a number from 0 to 1", fix="correct it")
    return ratio


class OpenTelemetryTracer:
    """Hands spans to a processor of the SDK.

    Args:
        processor: What takes them; it is shut down, and so emptied, at the end of the process.
        ratio: The share of traces to keep.
    """

    is_on = True

    def __init__(self, processor: SpanProcessor, *, ratio: float = 1.0) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        from eagleray import __version__

        name = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": SERVICE}
        self._resource = Resource.create({**name, "service.version": __version__})
        self._scope = InstrumentationScope("eagleray", __version__)
        self._processor, self._bound = processor, int(ratio * (1 << _LOW_BITS))
        atexit.register(processor.shutdown)

    def record(self, span: Span) -> None:
        """Takes a span that is over; one that is not sampled is let go."""
        is_kept = int(span.context.trace_id, 16) & ((1 << _LOW_BITS) - 1) < self._bound
        if span.context.is_sampled and is_kept:
            self._processor.on_end(self._readable(span))

    def close(self) -> None:
        """Sends what is left and stops."""
        atexit.unregister(self._processor.shutdown)
        self._processor.shutdown()

    def _readable(self, span: Span) -> ReadableSpan:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.status import Status, StatusCode

        trace_id = span.context.trace_id
        return ReadableSpan(
            name=span.name,
            context=_context(trace_id, span.context.span_id, is_remote=False),
            parent=_context(trace_id, span.parent_id, is_remote=span.is_server) if span.parent_id else None,
            resource=self._resource,
            attributes={**span.attributes, **({"error.type": span.error} if span.error else {})},
            kind=SpanKind.SERVER if span.is_server else SpanKind.INTERNAL,
            status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.UNSET),
            start_time=span.start_ns,
            end_time=span.end_ns,
            instrumentation_scope=self._scope,
        )


def _context(trace_id: str, span_id: str, *, is_remote: bool) -> Any:
    from opentelemetry.trace import SpanContext, TraceFlags

    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote, TraceFlags(TraceFlags.SAMPLED))
