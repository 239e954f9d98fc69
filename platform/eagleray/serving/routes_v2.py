"""The routes of /v2: the Open Inference Protocol, as the stock tritonclient and KServe's clients speak it.

Example:
    >>> routes = v2_routes(desk)
"""

from __future__ import annotations

from starlette.routing import Route

from eagleray import __version__
from eagleray.serving.calls import Call, Desk, Endpoint, Handler, Reply
from eagleray.serving.protocol_v2 import EMBEDDING, HEADER_LENGTH, metadata, read_request, write_response
from eagleray.serving.refusals import Refusal, empty_body, unsupported_media_type
from eagleray.serving.routes_v1 import refuse_all_bad, refuse_encoded
from eagleray.serving.service import ModelCard
from eagleray.serving.uploads import ANY_BYTES, JSON

_READ = ("", JSON, ANY_BYTES)  # tritonclient names no type


def v2_routes(desk: Desk) -> list[Route]:
    """The routes, the busiest first."""
    found = []
    for place in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        for ending, name, method, handler in _PER_MODEL:
            found.append(Route(place + ending, Endpoint(desk, name, {method: handler})))
    return [
        *found,
        Route("/v2/health/live", Endpoint(desk, "health", {"GET": live})),
        Route("/v2/health/ready", Endpoint(desk, "health", {"GET": ready})),
        Route("/v2", Endpoint(desk, "server", {"GET": server})),
    ]


async def infer(call: Call) -> Reply:
    """POST /v2/models/NAME[/versions/VERSION]/infer."""
    card = _model(call, action="predict")
    refuse_encoded(call)
    if (call.header(b"content-type") or "").partition(";")[0].strip().lower() not in _READ:
        raise unsupported_media_type(_READ[1:])
    body = await call.body()
    if not body:
        raise empty_body()
    header_length = call.header(HEADER_LENGTH.encode())
    request = read_request(body, header_length=header_length, card=card, limits=call.desk.limits)
    if request.wants(EMBEDDING):
        call.model(card.name, action="embed")
    wants = " ".join(output.name for output in request.outputs)
    ask = call.ask(card, wants=wants, timeout_s=request.timeout_s)
    call.exchange.inputs = request.images
    call.exchange.num_images = len(request.images) if request.pixels is None else len(request.pixels)
    service = call.desk.service
    if request.pixels is None:
        batch = await call.answered(service.predict(request.images, ask), ask)
    else:
        batch = await call.answered(service.infer(request.pixels, ask), ask)
    refuse_all_bad(batch)
    return call.reply(*write_response(batch, request, request_id=ask.request_id))


async def describe(call: Call) -> Reply:
    """GET /v2/models/NAME[/versions/VERSION]: its inputs and outputs."""
    return call.json(metadata(_model(call)))


async def model_ready(call: Call) -> Reply:
    """GET /v2/models/NAME[/versions/VERSION]/ready."""
    card = _model(call)
    is_ready = call.desk.service.is_ready(card.name)
    return call.json({"name": card.name, "ready": is_ready}, status=200 if is_ready else 503)


async def live(call: Call) -> Reply:
    """GET /v2/health/live: the process answers."""
    return call.json({"live": True})


async def ready(call: Call) -> Reply:
    """GET /v2/health/ready: the service as a whole answers."""
    is_ready = call.desk.service.is_ready()
    return call.json({"ready": is_ready}, status=200 if is_ready else 503)


async def server(call: Call) -> Reply:
    """GET /v2: the server and its extensions."""
    return call.json({"name": "eagleray", "version": __version__, "extensions": ["binary_tensor_data"]})


def _model(call: Call, *, action: str = "") -> ModelCard:
    """The model of the path; its version, where the path names one, must be the one that is served."""
    call.query()
    card = call.model(call.path["model"], action=action)
    if call.path.get("version", card.version) != card.version:
        raise Refusal("unknown_model", f"{card.name} is served in version {card.version}")
    return card


_PER_MODEL: tuple[tuple[str, str, str, Handler], ...] = (
    ("/infer", "infer", "POST", infer),
    ("/ready", "model", "GET", model_ready),
    ("", "model", "GET", describe),
)
