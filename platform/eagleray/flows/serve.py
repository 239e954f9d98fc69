"""``eagleray serve``: what a person says about a service, made into its settings and started on this machine.

Two rules stand here because they are about the person and not the service: who gives no key file gets a key of this
run, which lies in a private file and ends with it; and the faster proxy takes keys or does not start.

Example:
    >>> run(ServeConfig(model="bundles/lite0"), announce=print)  # until Ctrl-C
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from eagleray.core.config import load
from eagleray.core.errors import ConfigError
from eagleray.core.progress import Note, notes
from eagleray.core.storage import make_folder
from eagleray.flows.scoring_place import RuntimeName
from eagleray.serving.access import KeyRequest, create_key
from eagleray.serving.settings import (
    MODEL_NAME,
    BehaviorConfig,
    ServingConfig,
)

WATCH_PERIOD_S = 5.0
KEYS, KEY_HEADER = "keys.json", "key"
TENANT = "local"


class ServeConfig(BehaviorConfig):
    """A service as a person gives it.

    Attributes:
        model: Bundles, each ``BUNDLE`` (its name is the folder's) or ``NAME=BUNDLE``; the first is the default.
        runtime, device, threads, engines: Of every model; see serving/settings.py:ModelEntry.
        host: Where it listens.
        port: 0 takes one that is free.
        is_fast: HAProxy in place of Serve's own proxy: several times the requests a second. Wants keys.
        keys: The key file; none: a key of this run.
        auth: ``none``: no keys, on loopback only.
        tls_cert, tls_key: PEM files.
        request_log: Folder that keeps a line a request (serving/request_log.py); none: they go with the service.
        metrics_port: Where Prometheus reads, on loopback; none: any port that is free.
        batching, limits, slo, autoscale, canary, memory, rates, drain_s: See serving/settings.py.
    """

    model: tuple[str, ...] = Field(min_length=1)
    runtime: RuntimeName = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(1, ge=1, le=256)
    engines: int = Field(1, ge=1, le=64)
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    is_fast: bool = False
    keys: str | None = None
    auth: Literal["keys", "none"] = "keys"
    tls_cert: str | None = None
    tls_key: str | None = None
    request_log: str | None = None
    metrics_port: int | None = Field(None, ge=1, le=65535)

    @field_validator("model", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


@dataclass(frozen=True)
class Running:
    """A service that answers.

    Attributes:
        url: Where, without a slash at the end.
        models: Names, the default first.
        version: Of the default model: its digest's first digits.
        key_file: The file with this run's ``Authorization`` header; None where the person's own keys count, or none do.
        needs_key: Whether requests need a key.
        is_tls: Whether it speaks TLS.
        proxy: "python" or "haproxy".
        seconds: How long the start took.
    """

    url: str
    models: tuple[str, ...]
    version: str
    key_file: Path | None
    needs_key: bool
    is_tls: bool
    proxy: str
    seconds: float


def run(config: ServeConfig, *, announce: Callable[[Running], None], is_quiet: bool = False) -> dict[str, Any]:
    """Serves until Ctrl-C or SIGTERM.

    Args:
        config: The service.
        announce: Told once, when it answers.
        is_quiet: Say nothing meanwhile.

    Returns:
        ``url`` and ``seconds``: how long it served.

    Raises:
        EagleError: It does not start.
    """
    from eagleray.flows import serve_local
    from eagleray.serving.models import pinned

    began, note = time.monotonic(), notes(is_quiet=is_quiet)
    with serve_local.private_folder() as folder:
        serving = pinned(_prepared(config, folder))  # a bundle that does not hold is refused before Ray starts
        with serve_local.started(serving, folder, metrics_port=config.metrics_port) as service, _interrupts() as ended:
            up = time.monotonic()
            announce(
                Running(
                    url=service.url,
                    models=tuple(entry.name for entry in serving.models),
                    version=(serving.models[0].digest or "")[:12],
                    key_file=folder / KEY_HEADER if serving.access.auth == "keys" and not config.keys else None,
                    needs_key=serving.access.auth == "keys",
                    is_tls=serving.http.tls_cert is not None,
                    proxy=serving.http.proxy,
                    seconds=up - began,
                )
            )
            _watch(ended, note)
            note("stopping: requests that are held are answered first")
        return {"url": service.url, "seconds": round(time.monotonic() - up, 1)}


def _prepared(config: ServeConfig, folder: Path) -> ServingConfig:
    """The settings with a port that is free and a key file that is there, written for the gateway too."""
    from eagleray.flows import serve_local
    from eagleray.flows.serve_gateway import REQUESTS_FOLDER
    from eagleray.flows.serve_haproxy import check_certificate
    from eagleray.serving.installation import write_settings

    keys = config.keys
    if config.auth == "keys" and keys is None:
        keys = str(folder / KEYS)
    serving = to_serving(config, keys_file=keys)  # every fault of the settings first
    if serving.http.tls_cert and serving.http.tls_key:
        check_certificate(serving.http.tls_cert, serving.http.tls_key)
    http = serving.http.model_copy(update={"port": serve_local.free_port(serving.http)})
    serving = serving.model_copy(update={"http": http})
    if config.auth == "keys" and config.keys is None:
        _, secret = create_key(folder / KEYS, KeyRequest(tenant=TENANT))
        with open(os.open(folder / KEY_HEADER, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(f"Authorization: Bearer {secret}\n")
    elif keys is not None and not Path(keys).is_file():
        raise ConfigError(
            f"no key file at {keys}",
            expected="a file that `eagleray apikeys create` wrote",
            fix=f"eagleray apikeys create --keys {keys} --tenant NAME, or leave --keys out for a key of this run",
        )
    if config.request_log:
        (folder / REQUESTS_FOLDER).symlink_to(make_folder(config.request_log).resolve())  # files in it are 0600
    write_settings(serving, folder)
    return serving


def to_serving(config: ServeConfig, *, keys_file: str | None = None) -> ServingConfig:
    """The service's settings of what a person gave.

    Args:
        config: What was given.
        keys_file: The key file that counts, where it is not the config's own.

    Raises:
        ConfigError: Every fault, in one message.
    """
    keys_file = keys_file or config.keys
    shared = {name: getattr(config, name) for name in ("runtime", "device", "threads", "engines")}
    models = [{"name": name, "bundle": str(Path(path).resolve()), **shared} for name, path in map(_named, config.model)]
    access = {"auth": config.auth, "keys_file": None if keys_file is None else str(Path(keys_file).resolve())}
    http = {
        "host": config.host,
        "port": config.port,
        "proxy": "haproxy" if config.is_fast else "python",
        "tls_cert": config.tls_cert and str(Path(config.tls_cert).resolve()),
        "tls_key": config.tls_key and str(Path(config.tls_key).resolve()),
    }
    given = {name: getattr(config, name) for name in BehaviorConfig.model_fields}
    return load(ServingConfig, overrides={"models": models, "access": access, "http": http, **given})


def _named(text: str) -> tuple[str, str]:
    """Name and path of ``NAME=BUNDLE`` or ``BUNDLE``; a ``=`` after what cannot be a name is a part of the path."""
    name, equals, path = text.partition("=")
    if equals and path and MODEL_NAME.fullmatch(name):
        return name, path
    return Path(text).resolve().name, text


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that Ctrl-C, SIGTERM and a closed terminal set: the end of a service is no error."""
    ended = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield ended
        return
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    saved = {name: signal.signal(getattr(signal, name), lambda *_: ended.set()) for name in names}
    try:
        yield ended
    finally:
        for name, handler in saved.items():
            signal.signal(getattr(signal, name), handler)


def _watch(ended: threading.Event, note: Note) -> None:
    """Waits for the end, and says when the service's state changes."""
    from ray import serve
    from ray.exceptions import RayError

    from eagleray.flows.deployment import APP

    state = "RUNNING"
    while not ended.wait(WATCH_PERIOD_S):
        try:
            application = serve.status().applications.get(APP)
            found = str(application.status.value) if application else "gone"
        except (RayError, TimeoutError) as error:
            found = f"Serve does not answer: {type(error).__name__}"
        if found != state:
            note(f"the service is {found.lower()}")
        state = found
