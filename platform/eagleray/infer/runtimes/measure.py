"""``--runtime auto``: measures the runtimes that are installed, about a second each, and remembers the answer.

Each is measured in a process of its own (``python -m eagleray.infer.runtimes.measure``), so that the caller's holds no
engine it does not use: a run with an ONNX bundle never imports torch. They take turns, so that a busy machine slows all
of them alike, and one that is far behind after its first turn is left out of the rest. The answer is remembered per
model, preprocessing, processor, threads and engine versions, under EAGLERAY_CACHE or ~/.cache/eagleray; a cache that
cannot be written is done without.

Example:
    >>> choose_runtime(bundle, threads=1)
    Choice(name='openvino', measured={'onnx': 63.0, 'openvino': 74.1}, is_remembered=False)
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from eagleray.core import processor
from eagleray.core.errors import CapabilityError
from eagleray.core.tables import installed
from eagleray.infer.runtimes import CHUNK, RUNTIMES, Runtime, Uint8
from eagleray.infer.runtimes.engine_process import Answer, EngineProcess, serve
from eagleray.infer.runtimes.memory import graphics, recall, remember
from eagleray.vision.bundle import FOREIGN, ONNX, SAFETENSORS, ModelBundle

MODULE = "eagleray.infer.runtimes.measure"
MEMORY = "runtimes"
SCHEMA = 3  # of the remembered answer: a new one forgets the old
ROUNDS = 4
ROUND_S = 0.25
FAR_BEHIND = 0.4  # of the best first turn: below this a runtime does not catch up
TIMEOUT_S = 300.0  # for importing an engine, compiling (TensorRT takes minutes) and a second of work
NEEDS = {"torch": SAFETENSORS, "onnx": ONNX, "openvino": ONNX, "tensorrt": ONNX}
ORDER = ("onnx", "openvino", "tensorrt", "torch")  # the sooner to start comes first, and wins a tie
ON = {"cpu": ("onnx", "openvino", "torch"), "cuda": ("tensorrt", "onnx", "torch")}
CUDA_BATCH = 128


@dataclass(frozen=True)
class Choice:
    """The runtime that ``auto`` stands for here.

    Attributes:
        name: A name of RUNTIMES.
        measured: Runtime to images a second of one worker; empty when there was nothing to choose from.
        is_remembered: Whether the figures are of an earlier run.
        failed: Runtime to why it could not be measured.
    """

    name: str
    measured: Mapping[str, float] = field(default_factory=dict)
    is_remembered: bool = False
    failed: Mapping[str, str] = field(default_factory=dict)


def candidates(bundle: ModelBundle, device: str = "cpu") -> tuple[str, ...]:
    """The installed runtimes that can run this bundle on this device, the soonest to start first."""
    here = installed(RUNTIMES)
    fitting = [name for name in ORDER if name in here and NEEDS[name] in bundle.files]
    if bundle.precision != "fp32":
        fitting = [name for name in fitting if NEEDS[name] == ONNX]  # the arithmetic stands in the graph alone
    return tuple(name for name in fitting if name in ON[device])


def choose_runtime(bundle: ModelBundle, *, threads: int, device: str = "cpu") -> Choice:
    """The fastest runtime for this bundle on this machine.

    Args:
        bundle: The model.
        threads: Threads of one worker.
        device: "cpu" or "cuda".

    Raises:
        CapabilityError: No installed runtime can run the bundle.
    """
    names = candidates(bundle, device)
    if not names:
        raise CapabilityError(
            f"no installed runtime can run {bundle.name} on {device}: it holds {', '.join(sorted(bundle.files))}",
            expected="onnx or openvino for model.onnx, torch for model.safetensors",
            fix='pip install "eagleray[openvino]" -c constraints.txt',
        )
    if len(names) == 1:
        return Choice(names[0])
    key = _key(bundle, names, threads=threads, device=device)
    remembered = _recall(key, names)
    if remembered:
        return Choice(_fastest(remembered), remembered, is_remembered=True)
    measured, failed = _measure(bundle, names, threads=threads, device=device)
    if not measured:
        raise CapabilityError(
            f"no runtime can run {bundle.name}: " + "; ".join(f"{name}: {why}" for name, why in failed.items()),
            expected="one that compiles the model",
            fix="ask for one with --runtime to see its own message",
        )
    if not failed:
        remember(MEMORY, key, {"measured": {name: round(rate, 2) for name, rate in measured.items()}})
    return Choice(_fastest(measured), measured, failed=failed)


def _fastest(measured: Mapping[str, float]) -> str:
    return max(measured, key=lambda name: measured[name])


def _measure(
    bundle: ModelBundle, names: Sequence[str], *, threads: int, device: str
) -> tuple[dict[str, float], dict[str, str]]:
    """Images a second of each runtime, median over rounds in turn; and why the others could not be measured."""
    with contextlib.ExitStack() as stack:
        probes = {
            name: stack.enter_context(
                EngineProcess(MODULE, bundle, name, threads=threads, device=device, timeout_s=TIMEOUT_S)
            )
            for name in names
        }

        def rate(name: str, seconds: float) -> float:
            return float(probes[name].ask({"seconds": seconds})["images_per_s"])

        failed: dict[str, str] = {}
        rates: dict[str, list[float]] = {}
        for name in names:  # the first turn: until it is compiled, and one batch
            try:
                rates[name] = [rate(name, 0.0)]
            except CapabilityError as error:
                failed[name] = error.seen
        best = max((first for (first,) in rates.values()), default=0.0)
        near = [name for name, (first,) in rates.items() if first >= FAR_BEHIND * best]
        for _ in range(ROUNDS):
            for name in near:
                rates[name].append(rate(name, ROUND_S))
    return {name: statistics.median(found[1:] or found) for name, found in rates.items()}, failed


def main(arguments: Sequence[str], stdin: IO[str], stdout: IO[str]) -> int:
    """A probe: asked for so many ``seconds``, it answers ``images_per_s``."""

    def ready(bundle: ModelBundle, runtime: Runtime, _: float) -> Answer:
        batch = random_pixels(bundle, CHUNK if runtime.device == "cpu" else CUDA_BATCH)
        runtime.run(batch)
        return lambda request: {"images_per_s": images_per_second(runtime, batch, float(request["seconds"]))}

    return serve(arguments, stdin, stdout, ready=ready)


def random_pixels(bundle: ModelBundle, num_images: int) -> Uint8:
    """uint8 (N, H, W, 3), the same each time: the time of these models does not depend on what is seen."""
    shape = (num_images, bundle.image_spec.height, bundle.image_spec.width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def images_per_second(runtime: Runtime, batch_u8_nhwc: Uint8, seconds: float) -> float:
    """The median rate over runs of a batch for about so many seconds, at least one.

    Args:
        runtime: Compiled.
        batch_u8_nhwc: uint8, shape (N, H, W, 3).
        seconds: How long to measure.
    """
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while not rates or time.perf_counter() < end:
        start = time.perf_counter()
        runtime.run(batch_u8_nhwc)
        rates.append(len(batch_u8_nhwc) / (time.perf_counter() - start))
    return statistics.median(rates)


def _key(bundle: ModelBundle, names: Sequence[str], *, threads: int, device: str) -> dict[str, Any]:
    """All that the rates depend on."""
    return {
        "schema": SCHEMA,
        "model": _shape(bundle),
        "image_spec": bundle.image_spec.digest,
        "processor": processor.identity(),
        "graphics": graphics() if device == "cuda" else {},
        "threads": threads,
        "device": device,
        "versions": {name: RUNTIMES[name].version for name in names},
    }


def _shape(bundle: ModelBundle) -> Any:
    """What of a model its rates depend on: the values of its weights do not, where its graph follows from its name."""
    if bundle.architecture == FOREIGN or bundle.precision != "fp32":
        return bundle.model_digest  # its arithmetic stands in its own graph
    held = sorted(set(NEEDS.values()) & set(bundle.files))
    return [bundle.architecture, dict(bundle.model_args), len(bundle.labels), held]


def _recall(key: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """What was measured before; empty when it is not there or cannot be read."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        stored: dict[str, Any] = recall(MEMORY, key)["measured"]
        measured = {str(name): float(rate) for name, rate in stored.items()}
        if set(measured) == set(names) and all(rate > 0 for rate in measured.values()):
            return measured
    return {}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:], sys.stdin, sys.stdout))
