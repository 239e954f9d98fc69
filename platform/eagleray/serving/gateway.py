"""The middleware that every request passes first."""

from __future__ import annotations

from starlette.middleware import Middleware

from eagleray.serving.telemetry import Meter, NullMeter

SETTINGS_VARIABLE = "EAGLERAY_SERVING_SETTINGS"  # names the file (0600) that write_settings made


def serve_middlewares(meter: Meter | None = None) -> list[Middleware]:
    """The middlewares of a proxy or replica, with the settings of the file that SETTINGS_VARIABLE names.

    Raises:
        ConfigError: The variable is not set or the file does not hold: the proxy does not start.
    """
    raise NotImplementedError(meter or NullMeter())
