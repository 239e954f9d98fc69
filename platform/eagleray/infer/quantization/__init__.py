"""Quantisation once, in ONNX: a bundle's graph in 8 bits, or in half precision, as bytes that are proven to answer.

8 bits are static Q/DQ with a symmetric scale for each output channel of a weight (Jacob et al., 2018; the recipe of
TensorRT 11), calibrated on pixels, and layers that cost too much are left float by measurement. One file runs on ONNX
Runtime, OpenVINO and TensorRT; ``activations="uint8"`` gives that up for speed on CPUs. Nothing here saves a bundle or
reads labels: flows/release.py hands in pixels and ``evaluate``, and writes lineage.

NNCF 3.4 was measured beside it and is not offered: on EfficientNet-Lite0 the same speed in OpenVINO (2.46 and 2.85
times FP32 in ONNX Runtime, by the type of activations, with either), 13 dB of signal to noise in the logits against 19.

Refuses: bundles that are not fp32, one scale a tensor for depthwise networks, and a loss beyond ``max_drop_points``.

Example:
    >>> quantized = quantize(bundle, batches, settings=QuantizationSettings(), evaluate=accuracy_of)
    >>> quantized.table.num_quantized, quantized.table.drop_points
    (59, 0.0)
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from eagleray.core import processor
from eagleray.core.errors import ArtifactError, ConfigError
from eagleray.infer.quantization.calibration import Pixels, Range, calibrate
from eagleray.infer.quantization.correction import correct, mean_inputs
from eagleray.infer.quantization.graph import Layer, layers, prepare, serialize
from eagleray.infer.quantization.half import half
from eagleray.infer.quantization.placement import place, place_dynamic, refuse_per_tensor, tensors
from eagleray.infer.quantization.search import Evaluate, Found, rank, search
from eagleray.infer.quantization.settings import (
    LayerFate,
    QuantizationSettings,
    QuantizationTable,
    Quantized,
)
from eagleray.infer.runtimes import Float32, Uint8
from eagleray.vision.bundle import ONNX, ModelBundle

__all__ = ["LayerFate", "QuantizationSettings", "QuantizationTable", "Quantized", "quantize", "to_fp16"]


@dataclass(frozen=True)
class Work:
    """A quantisation under way.

    Attributes:
        bundle: The fp32 parent.
        model: Its graph, prepared.
        layers: What could be quantised.
        settings: As asked.
        is_reduced: Weights of 7 bits.
        pixels: The calibration images.
        ranges: Of activations; empty for the dynamic scheme.
        means: Of what layers are given; empty where biases are not corrected.
    """

    bundle: ModelBundle
    model: Any
    layers: tuple[Layer, ...]
    settings: QuantizationSettings
    is_reduced: bool
    pixels: Pixels
    ranges: dict[str, Range]
    means: dict[str, Float32]

    @property
    def open_layers(self) -> tuple[Layer, ...]:
        """The layers that the settings do not keep float."""
        return tuple(layer for layer in self.layers if layer.name not in self.settings.keep_float)

    def build(self, is_float: frozenset[str]) -> bytes:
        """The quantised graph with these layers, and those of keep_float, left float."""
        settings, names = self.settings, [one.name for one in self.open_layers if one.name not in is_float]
        if settings.scheme == "dynamic":
            model = place_dynamic(self.model, self.layers, settings, is_reduced=self.is_reduced)
        else:
            model = self._placed(names)
        return serialize(model, {"precision": "int8"})

    def rank(self) -> dict[str, float]:
        """What each layer does alone."""
        spec, settings = self.bundle.image_spec, self.settings

        def alone(name: str) -> Any:
            return self._placed([name])

        return rank(self.model, self.open_layers, alone, pixels=self.pixels, spec=spec, threads=settings.threads)

    def _placed(self, names: list[str]) -> Any:
        """The graph with these layers in 8 bits, their biases corrected."""
        model = place(self.model, names, self.ranges, self.settings, is_reduced=self.is_reduced)
        return correct(model, self.model, self.means) if self.means else model


def quantize(
    bundle: ModelBundle,
    calibration: Iterable[Uint8],
    *,
    settings: QuantizationSettings | None = None,
    evaluate: Evaluate | None = None,
) -> Quantized:
    """A bundle's graph in 8 bits.

    Args:
        bundle: An fp32 bundle that holds model.onnx.
        calibration: uint8 batches (n, H, W, 3) of images that are neither trained nor judged by; read once.
        settings: How; the defaults when not given.
        evaluate: Accuracy, 0..1, of the bytes of a graph on held-out images. Without it nothing is searched or proven.

    Returns:
        The graph's bytes, the same for the same bundle, images and settings, and the table of what was done.

    Raises:
        ConfigError: The bundle is not fp32, a layer of keep_float is not there, or one scale a tensor is asked for a
            depthwise network.
        ArtifactError: The bundle has no graph, or one that cannot be quantised.
        DataError: No calibration images, or such as do not fit the model.
        KpiNotMet: The accuracy cannot be kept inside ``max_drop_points``.
    """
    start = time.perf_counter()
    settings = settings or QuantizationSettings()
    data, what = _parent(bundle)
    is_reduced, reason = _reduction(settings)
    work = _begin(bundle, prepare(data, what), calibration, settings, is_reduced=is_reduced)
    if evaluate is None:
        found: Found | None = None
        quantized, is_float = work.build(frozenset()), frozenset[str]()
    else:
        candidates = work.open_layers if settings.scheme == "static" else ()
        found = search(candidates, build=work.build, rank=work.rank, evaluate=evaluate, parent=data, settings=settings)
        quantized, is_float = found.data, found.is_float
    table = QuantizationTable(
        settings=settings,
        reduce_range=is_reduced,
        reduce_reason=reason,
        num_images=work.pixels.num_images,
        calibration_digest=work.pixels.digest if work.pixels.num_images else "",
        layers=tuple(_fate(layer, work, is_float, found) for layer in work.layers),
        steps=found.steps if found else (),
        accuracy_before=found.before if found else None,
        accuracy_after=found.after if found else None,
        bytes_before=len(data),
        bytes_after=len(quantized),
        seconds=time.perf_counter() - start,
    )
    return Quantized(quantized, table)


def to_fp16(bundle: ModelBundle) -> bytes:
    """A bundle's graph in half precision; input and outputs, norms, softmax and reductions stay float32.

    Raises:
        ConfigError: The bundle is not fp32.
        ArtifactError: It has no graph, or one that cannot be typed.
    """
    data, what = _parent(bundle)
    return half(data, what, {"precision": "fp16"})


def _parent(bundle: ModelBundle) -> tuple[bytes, str]:
    """The parent's graph and its name."""
    if bundle.precision != "fp32":
        raise ConfigError(
            f"{bundle.name} is {bundle.precision} already",
            expected="the fp32 bundle that it was made from: a second rounding would add to the first",
            fix="name the parent (it stands in the bundle's lineage)",
        )
    return bundle.read_verified(ONNX), f"{bundle.name}/{ONNX}"


def _reduction(settings: QuantizationSettings) -> tuple[bool, str]:
    """Whether weights have 7 bits, and why."""
    if settings.reduce_range is not None:
        return settings.reduce_range, "as set"
    flags = processor.flags()
    if processor.saturates_int8(flags):
        return True, "this CPU has no VNNI: sums of two 8-bit products overflow 16 bits" if flags else "CPU not known"
    return False, f"this CPU's 8-bit dot products do not overflow ({', '.join(processor.features(flags)) or 'no x86'})"


def _begin(
    bundle: ModelBundle, model: Any, calibration: Iterable[Uint8], settings: QuantizationSettings, *, is_reduced: bool
) -> Work:
    """Checks what is asked, and calibrates."""
    found = layers(model)
    if not found:
        raise ArtifactError(
            f"{bundle.name} has no convolution or matrix product by constant weights",
            expected="a network with weights",
            fix="export and import the model again",
        )
    unknown = sorted(set(settings.keep_float) - {layer.name for layer in found})
    if unknown:
        raise ConfigError(
            f"keep_float names {', '.join(unknown[:3])}, which {bundle.name} does not have",
            expected=f"names of its layers: {', '.join(layer.name for layer in found[:5])}, ... ({len(found)} in all)",
            fix="take them from the table of a quantization",
        )
    refuse_per_tensor(found, settings)
    spec = bundle.image_spec
    pixels = Pixels(calibration, spec, most=settings.max_images, keep=settings.sensitivity_images)
    ranges: dict[str, Range] = {}
    if settings.scheme == "static":
        ranges = calibrate(model, tensors(model, found, settings), pixels, spec, settings)
    means: dict[str, Float32] = {}
    if settings.scheme == "static" and settings.correct_bias:
        means = mean_inputs(model, found, pixels.kept, spec, threads=settings.threads)
    return Work(bundle, model, found, settings, is_reduced, pixels, ranges, means)


def _fate(layer: Layer, work: Work, is_float: frozenset[str], found: Found | None) -> LayerFate:
    """What became of a layer, and why."""
    measured = found.sqnr_db.get(layer.name) if found else None
    if layer.name in work.settings.keep_float:
        return LayerFate(layer.name, layer.op_type, "float", "named by keep_float", measured)
    if work.settings.scheme == "dynamic" and layer.op_type not in ("Gemm", "MatMul"):
        return LayerFate(layer.name, layer.op_type, "float", "no matrix product: dynamic leaves it", measured)
    if layer.name in is_float:
        return LayerFate(layer.name, layer.op_type, "float", "the drop was beyond the budget with it", measured)
    return LayerFate(layer.name, layer.op_type, "int8", "", measured)
