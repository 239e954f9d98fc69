"""What Serve calls in each of its proxies, and in each replica that listens itself: the gateway, counted by Ray.

RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names ``middlewares`` (CALLBACK). When it raises, the proxy does not start: a
service whose gateway is missing answers nobody.

Example:
    >>> middlewares()[0].cls.__name__
    'Gateway'
"""

from __future__ import annotations

import functools

from starlette.middleware import Middleware

from eagleray.flows.serve_metrics import RayMeter
from eagleray.flows.tracing import tracer_from_environment
from eagleray.serving.installation import read_settings, serve_middlewares, state_folder
from eagleray.serving.request_log import RequestLog
from eagleray.serving.visits import Watch

CALLBACK = f"{__name__}:middlewares"
REQUESTS_FOLDER = "requests"


def middlewares() -> list[Middleware]:
    """The middlewares of this process.

    Raises:
        ConfigError: No settings, or no keys.
    """
    log = request_log()
    watch = Watch(meter=RayMeter(), tracer=tracer_from_environment(), log=log.refused)
    return serve_middlewares(watch)


@functools.cache
def request_log() -> RequestLog:
    """The request log of this process, beside the settings: one, though gateway and app share a process in fast mode.

    Raises:
        ConfigError: No settings.
        StorageError: The folder cannot be made.
    """
    _, path = read_settings()
    return RequestLog(state_folder(path) / REQUESTS_FOLDER)
