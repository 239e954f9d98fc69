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
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from eagleray.core.errors import CapabilityError, EagleError
from eagleray.core.tables import installed, resolve
from eagleray.infer.runtimes import CHUNK, RUNTIMES, Runtime, Uint8
from eagleray.infer.runtimes.memory import processor, recall, remember
from eagleray.vision.bundle import ONNX, SAFETENSORS, ModelBundle, load_bundle

MEMORY = "runtimes"
SCHEMA = 1  # of the remembered answer: a new one forgets the old
ROUNDS = 4
ROUND_S = 0.25
FAR_BEHIND = 0.4  # of the best first turn: below this a runtime does not catch up
TIMEOUT_S = 120.0  # for importing an engine, compiling and a second of work, on a slow disk
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
        probes = {name: stack.enter_context(_Probe(bundle, name, threads=threads, device=device)) for name in names}
        failed: dict[str, str] = {}
        rates: dict[str, list[float]] = {}
        for name in names:  # the first turn: until it is compiled, and one batch
            try:
                rates[name] = [probes[name].ask(0.0)]
            except CapabilityError as error:
                failed[name] = error.seen
        best = max((rate for (rate,) in rates.values()), default=0.0)
        near = [name for name, (rate,) in rates.items() if rate >= FAR_BEHIND * best]
        for _ in range(ROUNDS):
            for name in near:
                rates[name].append(probes[name].ask(ROUND_S))
    return {name: statistics.median(found[1:] or found) for name, found in rates.items()}, failed


class _Probe:
    """A process that holds one compiled runtime and measures it when asked."""

    def __init__(self, bundle: ModelBundle, name: str, *, threads: int, device: str) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
            "OMP_NUM_THREADS": str(threads),
        }
        command = [sys.executable, "-m", "eagleray.infer.runtimes.measure"]
        command += [str(bundle.path.resolve()), name, str(threads), device]
        self._name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )

    def __enter__(self) -> _Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, seconds: float) -> float:
        """Images a second over so many seconds.

        Raises:
            CapabilityError: The runtime does not run here, or does not answer in time.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None  # noqa: PT018  both are pipes
        watch = threading.Timer(TIMEOUT_S, self._process.kill)
        watch.start()
        try:
            stdin.write(f"{seconds}\n".encode())
            stdin.flush()
            answer = json.loads(stdout.readline())
        except (OSError, ValueError):
            raise CapabilityError(f"{self._name} ended with code {self._process.wait(10)}, or took too long") from None
        finally:
            watch.cancel()
        if "error" in answer:
            raise CapabilityError(str(answer["error"]))
        return float(answer["images_per_second"])


def main(arguments: Sequence[str], stdin: IO[str], stdout: IO[str]) -> int:
    """A probe: BUNDLE NAME THREADS DEVICE; for each line of seconds on stdin, one line of JSON on stdout."""
    path, name, threads, device = arguments
    try:
        bundle = load_bundle(path)
        runtime = resolve(RUNTIMES, name, what="runtime")(bundle, threads=int(threads), device=device)
        size = CHUNK if device == "cpu" else CUDA_BATCH
        shape = (size, bundle.image_spec.height, bundle.image_spec.width, 3)
        batch = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        runtime.run(batch)
        for line in stdin:
            stdout.write(json.dumps({"images_per_second": images_per_second(runtime, batch, float(line))}) + "\n")
            stdout.flush()
    except EagleError as error:
        stdout.write(json.dumps({"error": error.seen}) + "\n")
        stdout.flush()
    return 0


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
        "model": bundle.model_digest,
        "image_spec": bundle.image_spec.digest,
        "processor": processor(),
        "threads": threads,
        "device": device,
        "versions": {name: RUNTIMES[name].version for name in names},
    }


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
