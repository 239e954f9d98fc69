"""What a pool of workers is, wherever it runs; and how an error of ours crosses a process border.

Example:
    >>> Pool(workers=2, num_gpus=1.0)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from eagleray.core import errors
from eagleray.core.errors import EagleError


@dataclass(frozen=True)
class Pool:
    """How many workers and what each holds.

    Attributes:
        workers: Number of workers; 0 = one per core (or per accelerator when num_gpus > 0) of what is connected to.
        num_cpus: Logical CPUs a Ray actor holds.
        num_gpus: Accelerators a Ray actor holds, fractions allowed.
        is_local: Child processes instead of Ray.
    """

    workers: int = 0
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    is_local: bool = False


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_environment() -> dict[str, str]:
    """The environment of every worker: one thread per math library, nothing phones home."""
    return {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENVINO_TELEMETRY_OPT_OUT": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
        "ARROW_DEFAULT_MEMORY_POOL": "system",  # mimalloc maps 1 GiB ahead, which a limit on memory counts
    }


def error_json(error: EagleError) -> dict[str, str]:
    """An error of ours as JSON, to cross a process border."""
    return {"type": type(error).__name__, "seen": error.seen, "expected": error.expected, "fix": error.fix}


def rebuild_error(value: Mapping[str, str]) -> EagleError:
    """The error that crossed."""
    kind = getattr(errors, value["type"], EagleError)
    return kind(value["seen"], expected=value["expected"], fix=value["fix"])  # type: ignore[no-any-return]
