"""How the gateway gets into processes that are not ours: Serve's proxies, and replicas that listen themselves.

Serve calls one function without arguments in each of them and installs the middlewares that it returns. So the
settings stand in a file, and an environment variable names the file: what stands in the environment itself can be seen
by others of this machine. Without the variable, or with a file that does not hold, the function raises and no proxy
starts.

Example:
    >>> path = write_settings(config, folder)
    >>> os.environ[SETTINGS_VARIABLE] = str(path)
    >>> middlewares = serve_middlewares()
"""

from __future__ import annotations

import os
from pathlib import Path

from starlette.middleware import Middleware

from eagleray.core.config import load
from eagleray.core.errors import ConfigError
from eagleray.core.storage import make_folder, write_private
from eagleray.infer.runtimes.memory import cache_folder
from eagleray.serving.access import KeyFile
from eagleray.serving.admission import FileLedger, RateLimiter, ledger_name
from eagleray.serving.connections import install
from eagleray.serving.gateway import Gateway
from eagleray.serving.settings import ServingConfig
from eagleray.serving.visits import Watch

SETTINGS_VARIABLE = "EAGLERAY_SERVING_SETTINGS"
SETTINGS_FILE = "serving.json"


def write_settings(config: ServingConfig, folder: str | Path) -> Path:
    """Writes the settings where proxies and replicas of this machine find them.

    Args:
        config: The service.
        folder: Private to this user; the counters of rates and quotas stand in it too.

    Returns:
        The file's path, for SETTINGS_VARIABLE.

    Raises:
        StorageError: It cannot be written.
    """
    path = Path(folder).resolve() / SETTINGS_FILE
    write_private(path, (config.model_dump_json(indent=1) + "\n").encode())
    return path


def read_settings(path: str | Path | None = None) -> tuple[ServingConfig, Path]:
    """The settings, and their path.

    Args:
        path: The file, JSON or YAML; None = the one that SETTINGS_VARIABLE names.

    Raises:
        ConfigError: The variable is not set, or the file is missing or does not hold.
    """
    found = path or os.environ.get(SETTINGS_VARIABLE)
    if not found:
        raise ConfigError(
            f"{SETTINGS_VARIABLE} is not set",
            expected="the path of the file that write_settings made",
            fix="start the service with eagleray serve, or set it for every process of the cluster",
        )
    path = Path(found).absolute()
    if not path.is_file():
        raise ConfigError(f"no settings at {path}", expected="what write_settings wrote, or YAML", fix="write it")
    return load(ServingConfig, recipe=path), path


def state_folder(path: Path) -> Path:
    """Where counters and the request log stand: beside the settings, or in the cache where that is not writable.

    Args:
        path: Of the settings. Those of a cluster may lie on a read-only mount (a ConfigMap).

    Raises:
        StorageError: Neither can be written.
    """
    return path.parent if os.access(path.parent, os.W_OK) else make_folder(cache_folder("serving"))


def serve_middlewares(watch: Watch | None = None) -> list[Middleware]:
    """The middlewares of one proxy or replica: the gateway; and below it, guarded connections.

    Args:
        watch: What counts, traces and logs.

    Raises:
        ConfigError: No settings, or no keys: the process must not serve.
        StorageError: The counters cannot be made.
    """
    config, path = read_settings()
    keys = KeyFile(config.access.keys_file) if config.access.auth == "keys" and config.access.keys_file else None
    most = config.rates.max_tenants
    limiter = RateLimiter(FileLedger(state_folder(path) / ledger_name(str(path), most), most))
    install(config.limits)
    return [Middleware(Gateway, config=config, keys=keys, limiter=limiter, watch=watch)]
