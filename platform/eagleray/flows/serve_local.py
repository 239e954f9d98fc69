"""A service on this machine: an embedded Ray that only this machine reaches, a private folder, and a clean end.

Everything lives in one folder that nobody else may read (Ray's session, HAProxy's socket, the settings of the gateway,
the key of this run) and goes with it. What listens is checked once it is up: anything but the service's own port that
other machines reach ends it. A state file under EAGLERAY_CACHE says where ``eagleray rollout`` finds it.

Example:
    >>> with started(config) as service: ...
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagleray.core.errors import ClusterError, ConfigError
from eagleray.flows import serve_haproxy
from eagleray.flows.listeners import listeners, unexpected
from eagleray.flows.runtime import SPARE_CPUS, Embedded, cluster, first_fault
from eagleray.flows.serve_gateway import CALLBACK
from eagleray.infer.runtimes.memory import cache_folder
from eagleray.serving.installation import SETTINGS_FILE, SETTINGS_VARIABLE
from eagleray.serving.settings import HttpConfig, ServingConfig

STATES = "serving"  # under the cache: one file a port
MESSAGE_SPARE_BYTES = 2**20
LOOP_S = 0.25  # Serve's control loop; its own 0.1 s costs a twentieth of a core while nothing happens


@dataclass(frozen=True)
class Service:
    """A service that runs.

    Attributes:
        url: Where it answers, without a slash at the end.
        folder: Its private folder.
        address: Of its Ray.
    """

    url: str
    folder: Path
    address: str


def environment(config: ServingConfig, folder: Path) -> dict[str, str]:
    """What Ray's processes must know before they start.

    Args:
        config: The service; the port is known.
        folder: Its private folder; HAProxy's script is written into it.

    Raises:
        CapabilityError: HAProxy mode without HAProxy.
    """
    common = {
        SETTINGS_VARIABLE: str(folder.resolve() / SETTINGS_FILE),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": CALLBACK,
        "RAY_SERVE_ENABLE_HA_PROXY": "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0",
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # a hung engine cannot be asked to finish
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": str(LOOP_S),
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": str(config.autoscale.period_s),
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": str(config.autoscale.period_s),
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(config.limits.max_body_bytes + MESSAGE_SPARE_BYTES),
        "RAY_SERVE_LOG_CLIENT_ADDRESS": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
    }
    if config.http.proxy == "haproxy":
        common |= serve_haproxy.prepare(folder, config.http, head_timeout_s=config.limits.head_timeout_s)
    return common


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for one run, readable by its owner alone, removed at the end.

    Its path is short: a Unix socket's has at most 107 bytes, and HAProxy's lies under a node's id of 56.
    """
    folder = Path(tempfile.mkdtemp(prefix="er-", dir="/tmp" if os.path.isdir("/tmp") else None))  # noqa: S108
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_port(http: HttpConfig) -> int:
    """The port to listen on, free a moment ago.

    Raises:
        ConfigError: It is taken, by another ``eagleray serve`` or by something else.
    """
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((http.host, http.port))
        except OSError as error:
            raise _port_error(http, error) from error
        return int(probe.getsockname()[1])


def _port_error(http: HttpConfig, error: OSError) -> ConfigError:
    running = read_state(http.port)
    if running:
        return ConfigError(
            f"eagleray serve already answers at {running['url']} (process {running['pid']})",
            expected="one service a port",
            fix="use it, end it with Ctrl-C, change its model with `eagleray rollout`, or give another --port",
        )
    return ConfigError(
        f"{http.host}:{http.port} cannot be listened on: {error.strerror}",
        expected="an address of this machine and a port that nothing listens on",
        fix="give another --port (0 takes a free one), or end what listens there",
    )


@contextlib.contextmanager
def started(config: ServingConfig, folder: Path, *, metrics_port: int | None = None) -> Iterator[Service]:
    """Starts a service and ends it: Ray, Serve, its replicas, all of it.

    Args:
        config: The service; ``http.port`` is not 0.
        folder: Its private folder, with the gateway's settings in it.
        metrics_port: Where Prometheus reads.

    Yields:
        Where it is, once every replica answers.

    Raises:
        ClusterError: Ray or Serve does not start, or would listen where it should not.
        EagleError: A replica refuses its bundle, its engine or its settings.
    """
    http = config.http
    replicas = max(1, config.autoscale.max_replicas)
    embedded = Embedded(
        environment=environment(config, folder),
        num_cpus=math.ceil(2 * replicas * config.memory.cpus) + SPARE_CPUS,  # an update holds old and new at once
        folder=folder / "ray",
        metrics_port=metrics_port,
    )
    with contextlib.redirect_stdout(sys.stderr), cluster(None, embedded):  # Ray prints what nodes say to stdout
        import ray
        from ray import serve

        from eagleray.flows.deployment import APP, build, log_settings

        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # here; replicas and proxies have settings of their own
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options=http_options(config),
                logging_config=log_settings(),
            )
            serve.run(build(config), name=APP, route_prefix="/")
        except (RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
            raise start_error(error) from error
        try:
            refuse_wide(http)
            address = ray.get_runtime_context().gcs_address
            service = Service(url=url_of(http), folder=folder, address=address)
            with state_kept(http.port, {"url": service.url, "address": address, "pid": os.getpid()}):
                yield service
        finally:
            _shut_down(serve)


def _shut_down(serve: Any) -> None:
    """Ends Serve; Ray prints to stdout that the controller it has killed is dead, which is no news."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        serve.shutdown()


def http_options(config: ServingConfig) -> dict[str, Any]:
    """Serve's options: in HAProxy mode everything inside stays on loopback, and HAProxy speaks TLS."""
    http = config.http
    inner = http.proxy == "haproxy"
    tls = {} if inner or not http.tls_cert else {"ssl_certfile": http.tls_cert, "ssl_keyfile": http.tls_key}
    return {"host": serve_haproxy.LOOPBACK if inner else http.host, "port": http.port, **tls}


def url_of(http: HttpConfig) -> str:
    """Where a person on this machine finds it."""
    host = serve_haproxy.LOOPBACK if http.host in ("0.0.0.0", "::") else http.host  # noqa: S104
    return f"{'https' if http.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{http.port}"


def refuse_wide(http: HttpConfig) -> None:
    """Holds that nothing but the service itself, where it was asked, is reached from other machines.

    Raises:
        ClusterError: Something is.
    """
    allowed = [] if http.host in (serve_haproxy.LOOPBACK, "::1", "localhost") else [http.port]
    wide = unexpected(listeners(os.getpid()), allowed)
    if wide:
        raise ClusterError(
            f"these listen where other machines reach them: {', '.join(map(str, wide))}",
            expected="only the service's own port, and only where --host says so",
            fix="unset RAY_* variables that change what Ray binds, and start it again",
        )


def start_error(error: BaseException) -> Exception:
    """What kept a service from starting, in our words: an error of ours that a replica raised comes back as it was."""
    from eagleray.core import errors

    text = str(error)
    for kind in errors.EagleError.__subclasses__():
        _, found, rest = text.rpartition(f"eagleray.core.errors.{kind.__name__}: ")
        if found:
            seen, *lines = rest.splitlines()
            said = dict(line.strip().split(": ", 1) for line in lines[:2] if line.startswith(("  expected", "  do")))
            return kind(seen, expected=said.get("expected", ""), fix=said.get("do", ""))
    return ClusterError(
        f"the service did not start: {first_fault(error)}",
        expected="replicas that load their models and stay",
        fix="run it again with --debug; try the model with `eagleray predict` first",
    )


def state_path(port: int) -> Path:
    """Where the state of a service on a port stands."""
    return cache_folder(STATES) / f"{port}.json"


@contextlib.contextmanager
def state_kept(port: int, state: Mapping[str, Any]) -> Iterator[None]:
    """Writes the state file, readable by its owner alone, and takes it away again."""
    path = state_path(port)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
        json.dump(dict(state), file)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def read_state(port: int) -> dict[str, Any]:
    """The state of the service that runs on a port; empty when none does."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        state: dict[str, Any] = json.loads(state_path(port).read_text(encoding="utf-8"))
        os.kill(int(state["pid"]), 0)
        return state
    return {}
