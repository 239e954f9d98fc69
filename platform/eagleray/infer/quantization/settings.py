"""What quantisation takes and what it tells: settings, and the table of layers and steps.

Example:
    >>> QuantizationSettings(calibration="percentile", max_drop_points=1.0)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import Field

from eagleray.core.config import Config


class QuantizationSettings(Config):
    """How to make 8 bits of 32.

    Attributes:
        scheme: ``static``: scales of activations from calibration; ``dynamic``: found for each batch, matrix products
            only, on ONNX Runtime and OpenVINO only.
        activations: ``int8``: zero points are 0, one file for ONNX Runtime, OpenVINO and TensorRT; ``uint8``: affine,
            the fastest on CPUs, and no TensorRT.
        calibration: How a range is taken from what an activation was: ``minmax``, ``entropy`` (least information lost)
            or ``percentile``.
        percentile: Of the values that lie inside the range.
        max_images: Images of the calibration split that are used, at most.
        per_channel: A scale for each output channel of a weight.
        reduce_range: Weights of 7 bits; None: where this CPU's 8-bit dot products overflow (x86 without VNNI).
        correct_bias: Take the mean error of rounded weights out of the biases.
        keep_float: Names of layers that stay float whatever they cost.
        max_drop_points: Accuracy that may be lost, in points (hundredths).
        max_float_share: Of the layers, how many the search may leave float.
        max_evaluations: Of accuracy, by the search, the parent's included.
        sensitivity_images: Images by which layers are ranked and biases corrected.
        threads: Of the engine that calibrates.
    """

    scheme: Literal["static", "dynamic"] = "static"
    activations: Literal["int8", "uint8"] = "int8"
    calibration: Literal["minmax", "entropy", "percentile"] = "minmax"
    percentile: float = Field(99.99, gt=50, le=100)
    max_images: int = Field(256, ge=1, le=100_000)
    per_channel: bool = True
    reduce_range: bool | None = None
    correct_bias: bool = True
    keep_float: tuple[str, ...] = ()
    max_drop_points: float = Field(0.5, ge=0, le=100)
    max_float_share: float = Field(0.5, ge=0, le=1)
    max_evaluations: int = Field(12, ge=2)
    sensitivity_images: int = Field(16, ge=1, le=1024)
    threads: int = Field(1, ge=1)


@dataclass(frozen=True)
class LayerFate:
    """What became of a layer.

    Attributes:
        name: The node's name in the graph.
        op_type: Conv, Gemm, MatMul or Add.
        precision: ``int8`` or ``float``.
        reason: Why it stayed float.
        sqnr_db: Signal to noise of the logits, in dB, when it alone is quantised; None where it was not measured.
    """

    name: str
    op_type: str
    precision: Literal["int8", "float"]
    reason: str = ""
    sqnr_db: float | None = None


@dataclass(frozen=True)
class Step:
    """One measurement of the search.

    Attributes:
        num_float: Layers left float.
        accuracy: 0..1.
        drop_points: Below the parent's, in points.
        seconds: Quantising and evaluating.
    """

    num_float: int
    accuracy: float
    drop_points: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class QuantizationTable:
    """What was done and measured.

    Attributes:
        settings: As asked.
        reduce_range: Whether weights have 7 bits.
        reduce_reason: Why.
        num_images: Images of the calibration.
        calibration_digest: SHA-256, in hex, of their pixels, in order; empty where none were used.
        layers: In the graph's order.
        steps: In the order of the search; empty without ``evaluate``.
        accuracy_before: Of the parent, 0..1; None without ``evaluate``.
        accuracy_after: Of the result, 0..1; None without ``evaluate``.
        bytes_before: Of the parent's graph.
        bytes_after: Of the result.
        seconds: All in all.
    """

    settings: QuantizationSettings
    reduce_range: bool
    reduce_reason: str
    num_images: int
    calibration_digest: str
    layers: tuple[LayerFate, ...]
    steps: tuple[Step, ...]
    accuracy_before: float | None
    accuracy_after: float | None
    bytes_before: int
    bytes_after: int
    seconds: float

    @property
    def num_quantized(self) -> int:
        """Layers in 8 bits."""
        return sum(layer.precision == "int8" for layer in self.layers)

    @property
    def drop_points(self) -> float | None:
        """What accuracy was lost, in points; None without ``evaluate``."""
        if self.accuracy_before is None or self.accuracy_after is None:
            return None
        return 100 * (self.accuracy_before - self.accuracy_after)

    def to_json(self) -> Mapping[str, Any]:
        """The table as JSON values, for a lineage or a report."""
        return {
            "settings": self.settings.model_dump(mode="json"),
            "reduce_range": {"value": self.reduce_range, "reason": self.reduce_reason},
            "calibration": {"images": self.num_images, "digest": self.calibration_digest},
            "layers": [asdict(layer) for layer in self.layers],
            "steps": [asdict(step) for step in self.steps],
            "accuracy": {"before": self.accuracy_before, "after": self.accuracy_after},
            "bytes": {"before": self.bytes_before, "after": self.bytes_after},
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Quantized:
    """A quantised graph.

    Attributes:
        data: The ONNX file's bytes.
        table: What was done to make it.
    """

    data: bytes
    table: QuantizationTable
