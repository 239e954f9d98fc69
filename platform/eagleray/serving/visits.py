"""One request while it is in the gateway, and what counts, traces and logs it when it is over, whoever answered it.

A visit is told of by the status that the client saw: the app's, the gateway's own refusal, Serve's, or 499 when nobody
waited. So requests and their latency are counted here and nowhere else.

Example:
    >>> visit = open_visit(scope, budget)
    >>> Watch(meter=meter).tell(visit, ("lite0",))
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from starlette.types import Scope

from eagleray.serving.access import KeyRecord
from eagleray.serving.admission import Rates
from eagleray.serving.bodies import Body, Budget
from eagleray.serving.exchanges import CLIENT_GONE, NO_MODEL
from eagleray.serving.paths import Target, target_of
from eagleray.serving.telemetry import ADMISSIONS, BODY, REFUSALS, REQUEST, REQUESTS, Meter, NullMeter
from eagleray.serving.traces import NullTracer, Span, TraceContext, Tracer

LOG = logging.getLogger("eagleray.serving.gateway")
REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{8,64}")
DRAINED_BYTES = 65_536  # so much of a body that is not read the server swallows to keep the connection
NOBODY = "none"  # the tenant of a request without a valid key


@dataclass(slots=True)
class Visit:
    """One request.

    Attributes:
        scope: ASGI's, as the client sent it.
        request_id: The client's where it is 8 to 64 of A-Z a-z 0-9 _ -, else a new one.
        trace: The request's own span.
        parent_id: The client's span; None without one.
        target: What is asked.
        body: What was read of the body.
        declared: Its size as declared; None when it comes in chunks.
        tenant: Who asks; NOBODY until it is known.
        key: The key that was given; None without keys.
        rates: What the tenant may ask.
        held: Images that are kept from its quota until their number is known; 0 = none are.
        started_s: When it came, on the monotonic clock.
        taken_s: When all of it had come, on the same clock; 0 until then.
        seconds: How long it took from its beginning until its answer; 0 until it is over.
        status: What the client saw; 499 when it had gone.
        code: The refusal's, of the gateway or of Serve; "" when the app answered.
    """

    scope: Scope
    request_id: str
    trace: TraceContext
    parent_id: str | None
    target: Target
    body: Body
    declared: int | None = 0
    tenant: str = NOBODY
    key: KeyRecord | None = None
    rates: Rates | None = None
    held: int = 0
    started_s: float = field(default_factory=time.monotonic)
    taken_s: float = 0.0
    seconds: float = 0.0
    status: int = CLIENT_GONE
    code: str = ""

    @property
    def closes(self) -> bool:
        """Whether the connection must end: more of the body is to come than the server should swallow."""
        return not self.body.is_whole and (self.declared is None or self.declared > DRAINED_BYTES)

    def end(self) -> None:
        """Stops the clock, once, and forgets the body."""
        self.seconds = self.seconds or time.monotonic() - self.started_s
        self.body.release()


def open_visit(scope: Scope, budget: Budget) -> Visit:
    """The visit of an http request that has just come.

    Args:
        scope: ASGI's.
        budget: What its body is counted against.
    """
    request_id = first(scope["headers"], b"x-request-id")
    trace = TraceContext.parse(first(scope["headers"], b"traceparent").decode("latin-1"))
    return Visit(
        scope=scope,
        request_id=request_id.decode() if REQUEST_ID.fullmatch(request_id) else secrets.token_hex(8),
        trace=trace.child() if trace else TraceContext.new(),
        parent_id=trace.span_id if trace else None,
        target=target_of(scope["method"], scope["path"], scope.get("query_string", b"")),
        body=Body(budget),
    )


def first(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    """A header's first value; empty when there is none."""
    return next((value for key, value in headers if key == name), b"")


@dataclass(frozen=True)
class Watch:
    """What is told of visits.

    Attributes:
        meter: What counts.
        tracer: Where the span of each request goes.
        log: Takes each visit that the app did not answer (what it answers, it logs itself).
    """

    meter: Meter = field(default_factory=NullMeter)
    tracer: Tracer = field(default_factory=NullTracer)
    log: Callable[[Visit], None] | None = None

    def tell(self, visit: Visit, models: Sequence[str]) -> None:
        """Counts, traces and logs a visit that is over; a fault in it is logged and costs no answer.

        Args:
            visit: One that has ended.
            models: The service's, the default one first: no other name becomes a label.
        """
        try:
            self._count(visit, models)
            if visit.code and self.log is not None:
                self.log(visit)
            if self.tracer.is_on and visit.trace.is_sampled:
                self._trace(visit)
        except Exception:
            LOG.exception("request %s could not be counted or logged", visit.request_id)

    def _count(self, visit: Visit, models: Sequence[str]) -> None:
        target = visit.target
        asked = target.model or (models[0] if target.action else "")
        model = asked if asked in models else NO_MODEL
        self.meter.add(REQUESTS, model=model, route=target.route, status=str(visit.status))
        if visit.status < 400 and visit.taken_s:
            # Without the time of a slow upload, and without refusals, whose milliseconds would hide slow answers
            served_s = visit.started_s + visit.seconds - visit.taken_s
            self.meter.observe(REQUEST, served_s, model=model, route=target.route)
        if visit.body.num_read:
            self.meter.observe(BODY, float(visit.body.num_read), route=target.route)
        if visit.code:
            self.meter.add(REFUSALS, code=visit.code)
        if visit.code or visit.tenant != NOBODY:
            self.meter.add(ADMISSIONS, tenant=visit.tenant, outcome=visit.code or "admitted")

    def _trace(self, visit: Visit) -> None:
        method, target, end_ns = visit.scope["method"], visit.target, time.time_ns()
        attributes: dict[str, str | int | float | bool] = {
            "http.request.method": method,
            "http.route": target.route,
            "http.response.status_code": visit.status,
            "http.request.body.size": visit.body.num_read,
            "eagleray.request_id": visit.request_id,
        }
        error = (visit.code or str(visit.status)) if visit.status >= 500 else None
        start_ns = end_ns - int(visit.seconds * 1e9)
        name = f"{method} {target.route}"
        self.tracer.record(
            Span(name, visit.trace, visit.parent_id, start_ns, end_ns, attributes, is_server=True, error=error)
        )
