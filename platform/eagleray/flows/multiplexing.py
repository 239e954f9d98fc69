"""More models than a replica holds: Serve's router is told which replica has which, and sends a request there.

Each replica keeps its models itself (serving/models.py: the first stays, of the others the one that was asked longest
ago makes room); Serve's own multiplexing, a list of the same length that is asked in the same order, only learns of it.
The gateway names the model in the header that Serve's router reads. Where all models fit, none of this is there: it
costs the router a look-up a request. In HAProxy mode no router of Serve's is asked, and a replica loads what it is
asked for.

Example:
    >>> serve.deployment(serve.ingress()(routed(Replica, config)))
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from eagleray.core.errors import EagleError
from eagleray.serving.refusals import Refusal
from eagleray.serving.settings import ServingConfig

HEADER = b"serve_multiplexed_model_id"


def is_routed(config: ServingConfig) -> bool:
    """Whether a replica cannot hold all models of a service."""
    return len(config.models) > config.memory.max_loaded_models


def routed(kind: type[Any], config: ServingConfig) -> type[Any]:
    """A replica's class that tells Serve which models it holds; the class itself where all models fit.

    Args:
        kind: Has ``shelf`` and ``__serve_build_asgi_app__``.
        config: The service.
    """
    if not is_routed(config):
        return kind
    from ray import serve

    names = frozenset(entry.name for entry in config.models[1:])  # every replica has the first

    async def touch(self: Any, model: str) -> Any:
        return (await self.shelf.get(model)).card  # not the model: Serve keeps what this gives, and its memory with it

    def build_app(self: Any) -> Any:
        return Touching(kind.__serve_build_asgi_app__(self), self.touch, names)

    tell = serve.multiplexed(max_num_models_per_replica=max(1, config.memory.max_loaded_models - 1))(touch)
    return type("RoutedReplica", (kind,), {"touch": tell, "__serve_build_asgi_app__": build_app})


class Touching:
    """An ASGI app that tells Serve of the model of a request, beside the answer and never in its way.

    Serve loads one model at a time and lets the others wait, and knows no deadline; the app waits for its model by the
    request's own.

    Args:
        app: The app.
        touch: Loads a model by its name.
        names: The models that may have to be loaded: what else stands in the header is the app's to refuse.
    """

    def __init__(self, app: Any, touch: Callable[[str], Awaitable[Any]], names: Collection[str]) -> None:
        self._app, self._touch, self._names = app, touch, names
        self._touching: dict[str, asyncio.Task[None]] = {}  # one a model, however many ask for it

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serves one connection."""
        name = dict(scope.get("headers", ())).get(HEADER, b"").decode("ascii", "replace")
        if name in self._names and name not in self._touching:
            self._touching[name] = asyncio.create_task(self._tell(name))
        await self._app(scope, receive, send)

    async def _tell(self, name: str) -> None:
        try:
            with contextlib.suppress(Refusal, EagleError):  # the app says it, in the form that the client reads
                await self._touch(name)
        finally:
            del self._touching[name]
