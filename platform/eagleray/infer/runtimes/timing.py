"""How fast engines are on this machine with given bundles: latency at batch 1, images a second at the best batch.

Each engine runs in a process of its own (``python -m eagleray.infer.runtimes.timing``) that holds no other, and all of
them take turns, round after round, so that a busy machine slows them alike: what is quoted is paired. Random pixels are
fed, since the time of these models does not depend on what is seen; decoding is not part of it.

Example:
    >>> time_engines({"parent": (bundle, "onnx"), "int8": (small, "openvino")}, TimingSettings())["int8"].best_batch
    8
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import IO, Any

import numpy as np

from eagleray.core.errors import CapabilityError
from eagleray.infer.runtimes import Runtime
from eagleray.infer.runtimes.engine_process import Answer, EngineProcess, serve
from eagleray.infer.runtimes.measure import random_pixels
from eagleray.vision.bundle import ModelBundle

MODULE = "eagleray.infer.runtimes.timing"
BATCHES = (1, 8, 32)
TIMEOUT_S = 300.0  # for importing an engine, compiling (TensorRT takes a minute), and a few batches
FEWEST = 3  # runs of a batch in a turn


@dataclass(frozen=True)
class TimingSettings:
    """How it is measured.

    Attributes:
        threads: Of each engine.
        device: "cpu" or "cuda".
        batches: Sizes whose rates are compared.
        rounds: Turns that each engine takes.
        turn_s: Seconds of a turn at each batch size.
    """

    threads: int = 1
    device: str = "cpu"
    batches: tuple[int, ...] = BATCHES
    rounds: int = 5
    turn_s: float = 0.3


@dataclass(frozen=True)
class Timing:
    """What one engine does with one bundle.

    Attributes:
        engine, version, precision, device: Of the runtime.
        threads: It ran with.
        latency_ms_p50, latency_ms_p95: Of a batch of one, over all turns.
        images_per_s: At the best batch, median over turns.
        best_batch: The batch size of that rate.
        rates: Batch size to images a second.
        compile_s: Until it could run.
        failed: Why it could not be measured; then the figures are 0.
    """

    engine: str
    version: str = ""
    precision: str = ""
    device: str = "cpu"
    threads: int = 1
    latency_ms_p50: float = 0.0
    latency_ms_p95: float = 0.0
    images_per_s: float = 0.0
    best_batch: int = 0
    rates: Mapping[int, float] | None = None
    compile_s: float = 0.0
    failed: str = ""


def time_engines(subjects: Mapping[str, tuple[ModelBundle, str]], settings: TimingSettings) -> dict[str, Timing]:
    """Measures bundles on engines, in turn.

    Args:
        subjects: Name to a bundle and the runtime that it is measured on.
        settings: How.

    Returns:
        A Timing by name; one that could not run says why.
    """
    found: dict[str, Timing] = {}
    samples: dict[str, dict[int, list[float]]] = {}
    with contextlib.ExitStack() as stack:
        probes: dict[str, EngineProcess] = {}
        for name, (bundle, engine) in subjects.items():
            probe = stack.enter_context(
                EngineProcess(
                    MODULE, bundle, engine, threads=settings.threads, device=settings.device, timeout_s=TIMEOUT_S
                )
            )
            try:
                about = probe.ask({"batch": 1, "seconds": 0.0})
                for size in settings.batches:
                    probe.ask({"batch": size, "seconds": 0.0})  # the first run of a size may compile
            except CapabilityError as error:
                found[name] = Timing(engine, failed=error.seen, threads=settings.threads, device=settings.device)
                continue
            told = {key: about[key] for key in ("version", "precision", "compile_s")}
            found[name] = Timing(engine, threads=settings.threads, device=settings.device, **told)
            probes[name], samples[name] = probe, {size: [] for size in settings.batches}
        for _ in range(settings.rounds):
            for size in settings.batches:
                for name in list(probes):
                    try:
                        answer = probes[name].ask({"batch": size, "seconds": settings.turn_s})
                    except CapabilityError as error:
                        found[name] = replace(found[name], failed=error.seen)
                        del probes[name], samples[name]
                        continue
                    samples[name][size] += answer["seconds"]
    return {name: _filled(timing, samples[name]) if name in samples else timing for name, timing in found.items()}


def _filled(timing: Timing, samples: Mapping[int, Sequence[float]]) -> Timing:
    """The figures of a Timing from seconds of each batch."""
    rates = {size: round(size / float(np.median(seconds)), 2) for size, seconds in samples.items()}
    best = max(rates, key=lambda size: rates[size])
    first = samples.get(1) or samples[min(samples)]
    p50, p95 = (round(1000 * float(value), 3) for value in np.quantile(first, [0.5, 0.95]))
    figures: dict[str, Any] = {"latency_ms_p50": p50, "latency_ms_p95": p95, "images_per_s": rates[best]}
    return Timing(**{**asdict(timing), **figures, "best_batch": best, "rates": rates})


def main(arguments: Sequence[str], stdin: IO[str], stdout: IO[str]) -> int:
    """A probe: asked for a ``batch`` and so many ``seconds``, it answers the ``seconds`` of each run."""

    def ready(bundle: ModelBundle, runtime: Runtime, compile_s: float) -> Answer:
        about = {"version": runtime.version, "precision": runtime.precision, "compile_s": round(compile_s, 3)}

        def answer(request: Mapping[str, Any]) -> dict[str, Any]:
            pixels = random_pixels(bundle, int(request["batch"]))
            return {**about, "seconds": _seconds(runtime, pixels, float(request["seconds"]))}

        return answer

    return serve(arguments, stdin, stdout, ready=ready)


def _seconds(runtime: Runtime, batch: Any, seconds: float) -> list[float]:
    """Seconds of each run of a batch, over about so many seconds; the first run of a size is not counted."""
    runtime.run(batch)
    found: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or (seconds and len(found) < FEWEST):
        start = time.perf_counter()
        runtime.run(batch)
        found.append(time.perf_counter() - start)
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:], sys.stdin, sys.stdout))
