"""One request and its answer, as those who count, trace and log see it: told once, after the answer is out.

Holds the inputs by reference for the time of the call, for keyed hashes in the request log; nobody keeps them.

Example:
    >>> tell(exchange, meter=MemoryMeter(), tracer=NullTracer())
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from eagleray.serving.passport import Passport
from eagleray.serving.service import Answer, Batch, ModelCard
from eagleray.serving.telemetry import DECISIONS, IMAGES, REFUSALS, Meter
from eagleray.serving.traces import Span, TraceContext, Tracer

NO_MODEL = "none"  # the label of a request that no model answers: never what a client typed
CLIENT_GONE = 499  # nginx's: the client closed the connection before there was an answer


@dataclass(slots=True)
class Exchange:
    """One request and its answer.

    Attributes:
        route: predict, embed, infer, models, ...: a closed set.
        request_id: As answered.
        started_ns: Unix time at which the request came to the app.
        started_s: The same moment of ``time.monotonic``.
        passport: Who asks; None where anybody may.
        card: The model that was asked, once it is known that the key opens it.
        body_bytes: Size of the body that was read.
        inputs: The encoded images; empty where pixels were sent.
        num_images: Images of the request, bad ones too.
        batch: The model's answers.
        status: HTTP's.
        code: The refusal's code; "" when it was answered as it was meant.
        seconds: From the request to the end of its answer.
    """

    route: str
    request_id: str
    started_ns: int = field(default_factory=time.time_ns)
    started_s: float = field(default_factory=time.monotonic)
    passport: Passport | None = None
    card: ModelCard | None = None
    body_bytes: int = 0
    inputs: Sequence[bytes] = ()
    num_images: int = 0
    batch: Batch | None = None
    status: int = 0
    code: str = ""
    seconds: float = 0.0

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The model's answers; none where it gave none."""
        return self.batch.answers if self.batch else ()


Log = Callable[[Exchange], None]


def tell(exchange: Exchange, *, meter: Meter, tracer: Tracer) -> None:
    """Counts what the app alone knows of an exchange, and traces it; requests are counted by the gateway (visits.py).

    Args:
        exchange: One that is over.
        meter: What counts.
        tracer: Where spans go.
    """
    model = exchange.card.name if exchange.card else NO_MODEL
    if exchange.code:
        meter.add(REFUSALS, code=exchange.code)
    for answer in exchange.answers:
        said = answer.prediction
        meter.add(IMAGES, model=model, status=said.status, reason=said.reason or "")
        if exchange.card and said.status == "scored":
            meter.add(DECISIONS, model=model, kind=_decision_kind(said.decision, exchange.card))
    if tracer.is_on and exchange.passport:
        _trace(exchange, exchange.passport, tracer)


def _decision_kind(decision: str | None, card: ModelCard) -> str:
    if decision is None:
        return "none"
    return "decided" if decision in card.label_names else "abstained"


def _trace(exchange: Exchange, passport: Passport, tracer: Tracer) -> None:
    """The app's span under the gateway's, and under it the steps of its slowest image, which came last."""
    context = TraceContext.parse(passport.trace) or TraceContext.new()
    if not context.is_sampled:
        return
    end_ns = exchange.started_ns + int(exchange.seconds * 1e9)
    attributes: dict[str, str | int | float | bool] = {
        "http.route": exchange.route,
        "http.response.status_code": exchange.status,
        "http.request.body.size": exchange.body_bytes,
        "eagleray.images": exchange.num_images,
        "eagleray.request_id": exchange.request_id,
    }
    if exchange.card:
        attributes |= {"eagleray.model": exchange.card.name, "eagleray.model_version": exchange.card.version}
    request = context.child()
    error = exchange.code if exchange.status >= 500 else None
    name = f"app {exchange.route}"
    tracer.record(Span(name, request, context.span_id, exchange.started_ns, end_ns, attributes, error=error))
    timings = [answer.timing for answer in exchange.answers]
    if not timings:
        return
    slowest = max(timings, key=lambda timing: timing.queue_ms + timing.decode_ms + timing.infer_ms)
    at_ns = exchange.started_ns
    for step, spent_ms in (("decode", slowest.decode_ms), ("queue", slowest.queue_ms), ("infer", slowest.infer_ms)):
        until_ns = at_ns + int(spent_ms * 1e6)
        tracer.record(Span(step, request.child(), request.span_id, at_ns, until_ns))
        at_ns = until_ns
