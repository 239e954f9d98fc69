"""What one engine makes of a bundle on this machine: how fast it starts and answers, and whether it answers right.

Each engine is asked in a process of its own (``python -m eagleray.infer.engine_check``), so that none disturbs another
and the caller's loads none.

Example:
    >>> check_engine(bundle, "openvino", threads=1).latency_ms_p50
    12.4
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import IO, Any

import numpy as np

from eagleray.core.errors import CapabilityError
from eagleray.infer.parity import check_parity
from eagleray.infer.runtimes import CHUNK, RUNTIMES, Runtime, Uint8
from eagleray.infer.runtimes.engine_process import EngineProcess, serve
from eagleray.infer.runtimes.measure import CUDA_BATCH, images_per_second, random_pixels
from eagleray.vision.bundle import ModelBundle

MODULE = "eagleray.infer.engine_check"
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
    empty = EngineCheck(engine=name, version=RUNTIMES[name].version, device=device)
    with EngineProcess(MODULE, bundle, name, threads=threads, device=device, timeout_s=TIMEOUT_S) as process:
        try:
            return replace(empty, **process.ask({}))
        except CapabilityError as error:
            return replace(empty, reason=error.seen)


def main(arguments: Sequence[str], stdin: IO[str], stdout: IO[str]) -> int:
    """A probe: asked for anything, it answers with the figures."""
    return serve(arguments, stdin, stdout, ready=lambda *held: lambda _: _measure(*held))


def _measure(bundle: ModelBundle, runtime: Runtime, start_s: float) -> dict[str, Any]:
    parity = check_parity(bundle, runtime).to_json()
    batch = CHUNK if runtime.device == "cpu" else CUDA_BATCH
    pixels = random_pixels(bundle, batch)
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
    raise SystemExit(main(sys.argv[1:], sys.stdin, sys.stdout))
