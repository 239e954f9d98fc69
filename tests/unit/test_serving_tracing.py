"""Trace contexts are read as the W3C asks; spans reach OpenTelemetry as they are, and only where an endpoint is set."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from eagleray.core.errors import CapabilityError, ConfigError
from eagleray.flows import tracing
from eagleray.flows.tracing import OpenTelemetryTracer, sampling_ratio, tracer_from_environment
from eagleray.serving.traces import NullTracer, Span, TraceContext

from tests.span_collector import collector

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (f"00-{TRACE}-{SPAN}-01", TraceContext(TRACE, SPAN, True)),
        (f"00-{TRACE}-{SPAN}-00", TraceContext(TRACE, SPAN, False)),
        (f" 00-{TRACE}-{SPAN}-03 ", TraceContext(TRACE, SPAN, True)),
        (f"cc-{TRACE}-{SPAN}-01-what-will-come", TraceContext(TRACE, SPAN, True)),  # a later version may add fields
        (f"00-{TRACE}-{SPAN}-01-more", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{TRACE}-{SPAN}", None),
        (f"00-{TRACE}-{SPAN}-01" + "x" * 1_000, None),
        ("", None),
        (None, None),
    ],
)
def test_a_traceparent_is_read_as_the_standard_asks(header: str | None, expected: TraceContext | None) -> None:
    """https://www.w3.org/TR/trace-context/#traceparent-header"""
    assert TraceContext.parse(header) == expected


def test_what_is_written_is_read() -> None:
    context = TraceContext.new()
    assert TraceContext.parse(context.to_header()) == context
    child = context.child()
    assert (child.trace_id, child.is_sampled) == (context.trace_id, True)
    assert child.span_id != context.span_id


def span(**changes: object) -> Span:
    given = {"name": "infer", "context": TraceContext(TRACE, SPAN), "parent_id": "b7ad6b7169203331"}
    return Span(**{**given, "start_ns": 1_000, "end_ns": 4_000, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "environment",
    [{}, {ENDPOINT: " "}, {ENDPOINT: "http://x:4318", "OTEL_SDK_DISABLED": "true"},
     {ENDPOINT: "http://x:4318", "OTEL_TRACES_SAMPLER": "always_off"}],
)  # fmt: skip
def test_without_an_endpoint_nothing_is_traced(environment: dict[str, str]) -> None:
    tracer = tracer_from_environment(environment)
    assert isinstance(tracer, NullTracer)
    assert not tracer.is_on
    tracer.record(span())


def test_without_an_endpoint_opentelemetry_is_not_imported() -> None:
    code = (
        "import sys; from eagleray.flows.tracing import tracer_from_environment as f; f({});"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("more", "seen"),
    [({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "grpc"), ({"OTEL_TRACES_SAMPLER": "jaeger_remote"}, "jaeger_remote"),
     ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "2"}, "ARG=2"),
     ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "half"}, "ARG=half")],
)  # fmt: skip
def test_what_is_not_ours_is_refused_with_what_would_do(more: dict[str, str], seen: str) -> None:
    with pytest.raises(ConfigError, match=seen):
        tracer_from_environment({ENDPOINT: "http://127.0.0.1:4318", **more})


def test_a_missing_exporter_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    with pytest.raises(CapabilityError) as refused:
        tracer_from_environment({ENDPOINT: "http://127.0.0.1:4318"})
    assert "eagleray[otel]" in refused.value.fix


def kept(ratio: float, *spans: Span) -> list[object]:
    """What OpenTelemetry's own processor hands to its exporter."""
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    tracer = OpenTelemetryTracer(SimpleSpanProcessor(exporter), ratio=ratio)
    for each in spans:
        tracer.record(each)
    found = list(exporter.get_finished_spans())
    tracer.close()
    return found


def test_a_span_arrives_as_it_is() -> None:
    attributes = {"http.response.status_code": 503, "eagleray.model": "lite0"}
    (one,) = kept(1.0, span(attributes=attributes, is_server=True, error="overloaded"))
    told = json.loads(one.to_json())  # type: ignore[attr-defined]
    assert told["name"] == "infer"
    assert told["context"]["trace_id"] == f"0x{TRACE}"
    assert told["context"]["span_id"] == f"0x{SPAN}"
    assert told["parent_id"] == "0xb7ad6b7169203331"
    assert told["kind"] == "SpanKind.SERVER"
    assert told["status"] == {"status_code": "ERROR", "description": "overloaded"}
    assert told["attributes"] == {**attributes, "error.type": "overloaded"}
    assert one.end_time - one.start_time == 3_000  # type: ignore[attr-defined]
    assert told["resource"]["attributes"]["service.name"] == "eagleray-serving"


def test_a_caller_who_does_not_sample_is_obeyed() -> None:
    assert kept(1.0, span(context=TraceContext(TRACE, SPAN, is_sampled=False))) == []


def test_every_process_keeps_the_same_share_of_traces() -> None:
    """As TraceIdRatioBased of the SDK decides, so that a trace is kept whole or not at all."""
    from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

    contexts = [TraceContext.new() for _ in range(300)]
    found = {one.context.trace_id for one in kept(0.3, *(span(context=context) for context in contexts))}  # type: ignore[attr-defined]
    sampler = TraceIdRatioBased(0.3)
    expected = {int(context.trace_id, 16) for context in contexts
                if sampler.should_sample(None, int(context.trace_id, 16), "x").decision.is_sampled()}  # fmt: skip
    assert found == expected
    assert 0 < len(found) < 300


@pytest.mark.parametrize(
    ("environment", "ratio"),
    [({}, 1.0), ({"OTEL_TRACES_SAMPLER": "always_on", "OTEL_TRACES_SAMPLER_ARG": "0.1"}, 1.0),
     ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.25"}, 0.25),
     ({"OTEL_TRACES_SAMPLER": "always_off"}, 0.0)],
)  # fmt: skip
def test_samplers(environment: dict[str, str], ratio: float) -> None:
    assert sampling_ratio(environment) == ratio


def test_spans_reach_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    with collector() as (address, got):
        monkeypatch.setenv(ENDPOINT, address)
        tracer = tracer_from_environment()
        assert isinstance(tracer, OpenTelemetryTracer)
        tracer.record(span(name="a-name-to-find"))
        tracer.close()  # sends what is left
    ((path, body),) = got
    assert path == "/v1/traces"
    assert bytes.fromhex(TRACE) in body
    assert b"a-name-to-find" in body


def test_a_collector_that_is_not_there_costs_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """record returns although nothing listens, and never raises."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
    tracer = tracer_from_environment()
    for _ in range(5_000):  # more than the exporter's queue holds
        tracer.record(span())
    assert tracer.is_on
    assert isinstance(tracer, OpenTelemetryTracer)
    tracer.close()
