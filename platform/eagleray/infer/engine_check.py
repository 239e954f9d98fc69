"""What one engine makes of a bundle on this machine: how fast it starts and answers, and whether it answers right.

Each engine is asked in a process of its own (``python -m eagleray.infer.engine_check``), so that none disturbs another
and the caller's loads none.

Example:
    >>> check_engine(bundle, "openvino", threads=1).latency_ms_p50
    12.4
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import IO, Any

import numpy as np

from eagleray.core.errors import EagleError
from eagleray.core.tables import resolve
from eagleray.infer.parity import check_parity
from eagleray.infer.runtimes import CHUNK, RUNTIMES, Runtime, Uint8
from eagleray.infer.runtimes.measure import CUDA_BATCH, images_per_second
from eagleray.vision.bundle import ModelBundle, load_bundle

TIMEOUT_S = 300.0  # a TensorRT engine of a large model is built meanwhile
WARM_RUNS, LEAST_RUNS, LATENCY_S, RATE_S = 3, 20, 1.0, 1.0


@dataclass(frozen=True, kw_only=True)
class EngineCheck:
    """What was measured of one engine, or why it could not be.

    Attributes:
        engine: A name of RUNTIMES.
        version: Its version.
        device: "cpu" or "cuda".
        precision: Its arithmetic.
        size_bytes: Of what it runs.
        start_s: From the bundle to compiled.
        latency_ms_p50, latency_ms_p95: Of one image.
        images_per_s: Of batches.
        batch: Images in such a batch.
        max_abs_dp: Largest difference of a probability to the probe set's.
        top1_agreement: Share of probes with the same most probable label, 0..1.
        is_passed: Whether the gate lets it through; None when it could not be asked.
        reason: Why it could not be measured; "" when it was.
    """

    engine: str
    version: str = ""
    device: str = "cpu"
    precision: str = ""
    size_bytes: int | None = None
    start_s: float | None = None
    latency_ms_p50: float | None = None
    latency_ms_p95: float | None = None
    images_per_s: float | None = None
    batch: int = 0
    max_abs_dp: float | None = None
    top1_agreement: float | None = None
    is_passed: bool | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON."""
        return asdict(self)


def check_engine(bundle: ModelBundle, name: str, *, threads: int = 1, device: str = "cpu") -> EngineCheck:
    """Measures one engine in a process of its own.

    Args:
        bundle: Saved.
        name: A name of RUNTIMES.
        threads: Of the engine.
        device: "cpu" or "cuda".

    Returns:
        The figures; with a reason in their place when the engine does not run here.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "OMP_NUM_THREADS": str(threads),
    }
    command = [sys.executable, "-m", "eagleray.infer.engine_check"]
    command += [str(bundle.path.resolve()), name, str(threads), device]
    empty = EngineCheck(engine=name, version=RUNTIMES[name].version, device=device)
    try:
        done = subprocess.run(command, capture_output=True, env=environment, timeout=TIMEOUT_S, check=False)
        found = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return replace(empty, reason=f"no answer within {TIMEOUT_S:.0f} s")
    except (ValueError, IndexError):
        return replace(empty, reason=f"its process ended with code {done.returncode}")
    return replace(empty, **found)


def main(arguments: Sequence[str], stdout: IO[str]) -> int:
    """BUNDLE NAME THREADS DEVICE: one line of JSON on stdout."""
    path, name, threads, device = arguments
    try:
        found = _measure(load_bundle(path), name, threads=int(threads), device=device)
    except EagleError as error:
        found = {"reason": error.seen}
    stdout.write(json.dumps(found) + "\n")
    return 0


def _measure(bundle: ModelBundle, name: str, *, threads: int, device: str) -> dict[str, Any]:
    kind = resolve(RUNTIMES, name, what="runtime")
    start = time.perf_counter()
    runtime: Runtime = kind(bundle, threads=threads, device=device)
    start_s = time.perf_counter() - start
    parity = check_parity(bundle, runtime).to_json()
    batch = CHUNK if device == "cpu" else CUDA_BATCH
    shape = (batch, bundle.image_spec.height, bundle.image_spec.width, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    p50, p95 = np.percentile(_latencies_ms(runtime, pixels[:1]), [50, 95])
    return {
        "precision": runtime.precision,
        "size_bytes": getattr(runtime, "size_bytes", None),
        "start_s": round(start_s, 3),
        "latency_ms_p50": round(float(p50), 3),
        "latency_ms_p95": round(float(p95), 3),
        "images_per_s": round(images_per_second(runtime, pixels, RATE_S), 2),
        "batch": batch,
        **{key: parity[key] for key in ("max_abs_dp", "top1_agreement", "is_passed")},
    }


def _latencies_ms(runtime: Runtime, image_u8_nhwc: Uint8) -> list[float]:
    """Milliseconds of single runs of one image, after a few that do not count."""
    found: list[float] = []
    end = time.perf_counter() + LATENCY_S
    while len(found) < WARM_RUNS + LEAST_RUNS or time.perf_counter() < end:
        start = time.perf_counter()
        runtime.run(image_u8_nhwc)
        found.append(1000 * (time.perf_counter() - start))
    return found[WARM_RUNS:]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:], sys.stdout))
