"""What a bundle takes: bytes, parameters, multiply-adds; on every engine that is here its latency and its throughput.

All bundles that are measured together take turns on all their engines, so that their figures can be compared. What
decoding takes is measured apart, on images of the corpus: it is the same for all models of one input size.

Example:
    >>> measure({"parent": parent, "int8": small})["int8"].best.images_per_s
    121.4
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eagleray.assure.cost import Work
from eagleray.core.errors import CapabilityError, EagleError
from eagleray.flows import hardware
from eagleray.infer.complexity import count
from eagleray.infer.runtimes.measure import candidates
from eagleray.infer.runtimes.timing import Timing, TimingSettings, time_engines
from eagleray.vision.bundle import ONNX, SAFETENSORS, ModelBundle
from eagleray.vision.images import ImageRefused, ImageSpec, decode


@dataclass(frozen=True)
class Measurement:
    """What one bundle takes.

    Attributes:
        model_bytes: Of the file that is deployed: model.onnx, or the weights where there is none.
        parameters, macs: Of its graph; None for a bundle without one.
        timings: One an engine that is installed and can run it.
    """

    model_bytes: int
    parameters: int | None
    macs: int | None
    timings: tuple[Timing, ...]

    @property
    def best(self) -> Timing:
        """The engine with the most images a second.

        Raises:
            CapabilityError: No engine could run it.
        """
        able = [timing for timing in self.timings if not timing.failed]
        if not able:
            raise CapabilityError(
                "no engine could be measured: " + "; ".join(f"{t.engine}: {t.failed}" for t in self.timings),
                expected="one that runs the bundle",
                fix="score it with --runtime to see the engine's own message",
            )
        return max(able, key=lambda timing: timing.images_per_s)

    def of(self, engine: str | None) -> Timing:
        """The Timing of an engine; the best for None.

        Raises:
            CapabilityError: It was not timed, or could not run.
        """
        if engine is None:
            return self.best
        found = next((timing for timing in self.timings if timing.engine == engine), None)
        if found is None or found.failed:
            raise CapabilityError(
                f"{engine} gave no figures: {found.failed if found else 'it was not timed'}",
                expected="an engine that runs the bundle here",
                fix="name another target, or run the release on a machine that it is for",
            )
        return found


def measure(
    bundles: Mapping[str, ModelBundle],
    settings: TimingSettings | None = None,
    *,
    engines: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Measurement]:
    """Measures bundles together.

    Args:
        bundles: By name.
        settings: Of the timing.
        engines: By bundle, only these; empty: every installed one that can run it.
    """
    chosen, only = settings or TimingSettings(), engines or {}
    subjects = {
        f"{name}\0{engine}": (bundle, engine)
        for name, bundle in bundles.items()
        for engine in candidates(bundle, chosen.device)
        if not only.get(name) or engine in only[name]
    }
    timed = time_engines(subjects, chosen)
    return {
        name: _measurement(bundle, [t for key, t in timed.items() if key.partition("\0")[0] == name])
        for name, bundle in bundles.items()
    }


def _measurement(bundle: ModelBundle, timings: Sequence[Timing]) -> Measurement:
    parameters = macs = None
    if ONNX in bundle.files:
        try:
            found = count(bundle.read_verified(ONNX), bundle.name)
            parameters, macs = found.parameters, found.macs
        except EagleError:  # a foreign graph of odd operators runs all the same: its counts are left out
            pass
    weights = bundle.path / (ONNX if ONNX in bundle.files else SAFETENSORS)
    return Measurement(weights.stat().st_size, parameters, macs, tuple(timings))


def decode_seconds(images: Sequence[bytes], spec: ImageSpec) -> float:
    """Median seconds that decoding one image takes on one core; 0 where none can be decoded.

    Args:
        images: Encoded images.
        spec: What the model wants.
    """
    found: list[float] = []
    for data in images:
        start = time.perf_counter()
        try:
            decode(data, spec)
        except ImageRefused:
            continue
        found.append(time.perf_counter() - start)
    return float(np.median(found)) if found else 0.0


def work_of(timing: Timing, decode_s: float) -> Work:
    """What one image takes, for its cost: decoding on a core, and the model on its cores or its GPU.

    Args:
        timing: Of the engine that will run it.
        decode_s: Core-seconds of decoding.
    """
    model_s = 1 / timing.images_per_s
    if timing.device == "cuda":
        return Work(decode_s, model_s, hardware.gpu_name(), platform.machine())
    return Work(decode_s + model_s * timing.threads, processor=platform.machine())
