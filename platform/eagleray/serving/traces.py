"""Traces: where a request stands in one (W3C Trace Context), and spans that are told when they are over.

A span is recorded afterwards, from timings that the answer carries anyway: a request pays nothing for a trace that
nobody reads. No OpenTelemetry here: flows/tracing.py sends spans on when an endpoint is set.

Example:
    >>> context = TraceContext.parse(headers.get("traceparent")) or TraceContext.new()
    >>> tracer.record(Span("infer", context.child(), context.span_id, start_ns, end_ns))
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True)
class TraceContext:
    """Where a request stands in a trace (W3C Trace Context, level 1).

    Attributes:
        trace_id: 32 hex digits, not all zero.
        span_id: 16 hex digits, not all zero.
        is_sampled: Whether the caller keeps this trace.
    """

    trace_id: str
    span_id: str
    is_sampled: bool = True

    @classmethod
    def new(cls) -> TraceContext:
        """The beginning of a trace."""
        return cls(secrets.token_hex(16), secrets.token_hex(8))

    @classmethod
    def parse(cls, traceparent: str | None) -> TraceContext | None:
        """Reads a ``traceparent`` header; None when it is not one, as the standard asks (then a new trace begins)."""
        found = _TRACEPARENT.fullmatch(traceparent.strip()) if traceparent and len(traceparent) <= 512 else None
        if found is None or found[1] == "ff" or (found[1] == "00" and found[5]):
            return None
        if set(found[2]) == {"0"} or set(found[3]) == {"0"}:
            return None
        return cls(found[2], found[3], bool(int(found[4], 16) & 1))

    def child(self) -> TraceContext:
        """A span below this one."""
        return TraceContext(self.trace_id, secrets.token_hex(8), self.is_sampled)

    def to_header(self) -> str:
        """The ``traceparent`` header."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.is_sampled else '00'}"


@dataclass(frozen=True)
class Span:
    """A piece of work that is over: told afterwards, so that a request pays nothing for a trace that nobody reads.

    Attributes:
        name: Of a closed set, e.g. ``"POST /v1/predict"``, ``"queue"``, ``"decode"``, ``"infer"``.
        context: The span itself.
        parent_id: The span above it, 16 hex digits; None at the top.
        start_ns: Unix time.
        end_ns: Unix time.
        attributes: Names of OpenTelemetry's conventions; never an input, a key or a file name.
        is_server: The span of a request that came from outside.
        error: What went wrong, as a code; None when nothing.
    """

    name: str
    context: TraceContext
    parent_id: str | None
    start_ns: int
    end_ns: int
    attributes: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    is_server: bool = False
    error: str | None = None


class Tracer(Protocol):
    """Where spans go: nowhere (NullTracer), or to OpenTelemetry when an endpoint is set (flows/tracing.py)."""

    @property
    def is_on(self) -> bool:
        """Whether anyone listens; when not, spans need not be made."""

    def record(self, span: Span) -> None:
        """Takes a span that is over; returns at once and never raises."""


class NullTracer:
    """Nobody listens."""

    is_on = False

    def record(self, span: Span) -> None:
        """Nothing."""
