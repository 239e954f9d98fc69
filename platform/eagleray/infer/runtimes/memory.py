"""What this machine has found out about a model, remembered: small JSON values by a key of all that they depend on.

They lie under EAGLERAY_CACHE or ~/.cache/eagleray, a folder a kind. A memory is never needed: one that cannot be read
or written is done without.

Example:
    >>> remember("runtimes", {"model": digest, "processor": processor.identity()}, {"measured": {"onnx": 63.0}})
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eagleray.core.config import digest_json
from eagleray.core.errors import EagleError
from eagleray.core.storage import read_json, write_json


def cache_folder(kind: str) -> Path:
    """Where what can be made again is kept; not made here."""
    return Path(os.environ.get("EAGLERAY_CACHE") or Path.home() / ".cache" / "eagleray") / kind


def recall(kind: str, key: Mapping[str, Any]) -> dict[str, Any]:
    """What was remembered under this key; empty when it is not there or cannot be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = read_json(_path(kind, key))
        return found if isinstance(found, dict) else {}
    return {}


def remember(kind: str, key: Mapping[str, Any], value: Mapping[str, Any]) -> None:
    """Keeps a value where it can be kept; a cache is no reason to fail."""
    with contextlib.suppress(OSError, EagleError):
        path = _path(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dict(value))


def _path(kind: str, key: Mapping[str, Any]) -> Path:
    return cache_folder(kind) / f"{digest_json(dict(key))[:32]}.json"


def graphics() -> dict[str, Any]:
    """The NVIDIA driver and the models of its devices, as the kernel tells them; empty where there is no driver."""
    root = Path("/proc/driver/nvidia")
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        found["driver"] = (root / "version").read_text(encoding="utf-8", errors="replace").splitlines()[0].strip()
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in (root / "gpus").glob("*/information")]
        lines = [line.partition(":") for text in texts for line in text.splitlines()]
        found["models"] = sorted(value.strip() for name, _, value in lines if name.strip() == "Model")
    return found
