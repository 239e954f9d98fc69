"""The HTTP side as one ASGI app: /v1, /v2, the drop page, the OpenAPI document, health.

It runs in a unit test, under a bare uvicorn, or in a Serve replica (flows/deployment.py), always behind the gateway
(gateway.py): without a passport of the gateway in the scope it answers 401 to everything but what anybody may ask.

Example:
    >>> app = build_app(shelf, limits=config.limits, meter=meter)
    >>> uvicorn.run(app)
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from eagleray.serving.calls import Desk, Endpoint
from eagleray.serving.exchanges import Log
from eagleray.serving.passport import Passport, passport_of
from eagleray.serving.routes_pages import page_routes
from eagleray.serving.routes_v1 import v1_routes
from eagleray.serving.routes_v2 import v2_routes
from eagleray.serving.service import Service
from eagleray.serving.settings import LimitsConfig
from eagleray.serving.telemetry import Meter, NullMeter
from eagleray.serving.traces import NullTracer, Tracer


def build_app(
    service: Service,
    *,
    limits: LimitsConfig | None = None,
    passport: Callable[[Scope], Passport] = passport_of,
    meter: Meter | None = None,
    tracer: Tracer | None = None,
    log: Log | None = None,
) -> ASGIApp:
    """The app around a service.

    Args:
        service: The models.
        limits: What a request may take; none = the defaults.
        passport: Who asks, by the ASGI scope.
        meter: What counts; none = nothing does.
        tracer: Where spans go; none = nowhere.
        log: Takes each exchange when it is over.
    """
    desk = Desk(
        service=service,
        limits=limits or LimitsConfig(),
        passport=passport,
        meter=meter or NullMeter(),
        tracer=tracer or NullTracer(),
        log=log,
    )
    routes = [*v1_routes(desk), *v2_routes(desk), *page_routes(desk)]
    return Router(routes, redirect_slashes=False, default=_Elsewhere(desk))


class _Elsewhere:
    """Whatever no route takes: a path is unknown, a WebSocket is closed."""

    def __init__(self, desk: Desk) -> None:
        self._unknown = Endpoint(desk, "unknown", {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] == "http":
            await self._unknown(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000, "reason": ""})
