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
from typing import Any

import numpy as np

from eagleray.assure.cost import Work
from eagleray.core.errors import CapabilityError, EagleError
from eagleray.flows import hardware
from eagleray.infer.complexity import count
from eagleray.infer.runtimes.measure import candidates
from eagleray.infer.runtimes.timing import Timing, TimingSettings, time_engines
from eagleray.vision.bundle import ONNX, SAFETENSORS, ModelBundle
from eagleray.vision.images import ImageRefused, ImageSpec, decode

MOST_DECODED = 64  # images that decoding is timed on


@dataclass(frozen=True)
class Measurement:
    """What one bundle takes.

    Attributes:
        model_digest: Of the bundle.
        model_bytes: Of the file that is deployed: model.onnx, or the weights where there is none.
        parameters, macs: Of its graph; None for a bundle without one.
        timings: One an engine that is installed and can run it.
        precision: The bundle's arithmetic.
    """

    model_digest: str
    model_bytes: int
    parameters: int | None
    macs: int | None
    timings: tuple[Timing, ...]
    precision: str = "fp32"

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
        """The Timing of an engine; the best for None, and where that engine could not run."""
        return next((t for t in self.timings if t.engine == engine and not t.failed), None) or self.best

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**vars(self), "timings": [timing.to_json() for timing in self.timings]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Measurement:
        """What to_json wrote."""
        return cls(**{**value, "timings": tuple(Timing.from_json(row) for row in value["timings"])})


def measure(
    bundles: Mapping[str, ModelBundle], settings: TimingSettings | None = None, *, engines: Sequence[str] = ()
) -> dict[str, Measurement]:
    """Measures bundles together.

    Args:
        bundles: By name.
        settings: Of the timing.
        engines: Only these; empty: every installed one that can run the bundle.
    """
    chosen = settings or TimingSettings()
    subjects = {
        f"{name}\0{engine}": (bundle, engine)
        for name, bundle in bundles.items()
        for engine in candidates(bundle, chosen.device)
        if not engines or engine in engines
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
    precision = getattr(bundle, "precision", "fp32")
    return Measurement(bundle.model_digest, weights.stat().st_size, parameters, macs, tuple(timings), precision)


def decode_seconds(images: Sequence[bytes], spec: ImageSpec) -> float:
    """Median seconds that decoding one image takes on one core; 0 where none can be decoded.

    Args:
        images: Encoded images.
        spec: What the model wants.
    """
    found: list[float] = []
    for data in images[:MOST_DECODED]:
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
