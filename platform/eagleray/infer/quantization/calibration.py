"""The ranges of activations, from pixels: batch by batch, in one pass, in memory that does not grow with their number.

An activation's values go into a histogram whose bins are a power of two wide: when a value falls outside, neighbours
are merged and the bins are twice as wide. So the same images give the same histogram in any order and any batches.

Refuses: pixels that do not fit the model's ImageSpec, and no pixels at all.

Example:
    >>> ranges = calibrate(model, {"hardtanh"}, pixels, spec, settings)
    >>> ranges["hardtanh"]
    (0.0, 6.0)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from eagleray.core.errors import ArtifactError, DataError
from eagleray.infer.quantization.settings import QuantizationSettings
from eagleray.infer.runtimes import CHUNK, Float32, Uint8
from eagleray.vision.images import ImageSpec, normalize
from eagleray.vision.onnx_graph import IMAGE

Range = tuple[float, float]
HALF = 2048  # bins on each side of 0; TensorRT's calibrators take as many (Migacz, GTC 2017)
LEVELS = 128  # of a signed 8-bit value on one side of 0
ENTROPY_STRIDE = 16  # bins between two candidates for the threshold: below 1 % of the range
MOST_OUTPUT_BYTES = 256 << 20  # activations of the images that go through at a time


class Pixels:
    """The images of a calibration, each batch once: checked, counted, hashed, the first ones kept.

    Args:
        batches: uint8 (n, H, W, 3), in the colour order of the ImageSpec.
        spec: The model's.
        most: Images to take; the rest is not read.
        keep: Images to keep, from the start.

    Raises:
        DataError: A batch that is not such pixels; or, at the end, no image.
    """

    def __init__(self, batches: Iterable[Uint8], spec: ImageSpec, *, most: int, keep: int) -> None:
        self._batches, self._spec, self._most, self._keep = batches, spec, most, keep
        self._hash = hashlib.sha256()
        self._kept: list[Uint8] = []
        self.num_images = 0

    def __iter__(self) -> Iterator[Uint8]:
        for batch in self._batches:
            left = self._most - self.num_images
            if left <= 0:
                break
            taken = np.ascontiguousarray(self._checked(batch)[:left])
            room = self._keep - sum(map(len, self._kept))
            if room > 0:
                self._kept.append(taken[:room].copy())
            self._hash.update(taken.data)
            self.num_images += len(taken)
            if len(taken):
                yield taken
        if not self.num_images:
            raise DataError(
                "the calibration split has no images",
                expected="some dozens to some hundreds of images like those that the model will see",
                fix="name a split that has images",
            )

    @property
    def kept(self) -> Uint8:
        """The first images."""
        return np.concatenate(self._kept)

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of all the pixels that were taken, in order."""
        return self._hash.hexdigest()

    def _checked(self, batch: Uint8) -> Uint8:
        spec = self._spec
        if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[1:] != (spec.height, spec.width, 3):
            raise DataError(
                f"a calibration batch is {batch.dtype} of shape {batch.shape}",
                expected=f"uint8 pixels of shape (n, {spec.height}, {spec.width}, 3), as images.decode gives them",
                fix="decode the split with the bundle's ImageSpec",
            )
        return batch


class Histogram:
    """Counts of values, in bins that are a power of two wide, 2,048 on each side of 0; and their extremes.

    Args:
        has_counts: Whether to count: the extremes alone take a tenth of the time.
    """

    def __init__(self, *, has_counts: bool = True) -> None:
        self._has_counts = has_counts
        self.counts = np.zeros(2 * HALF, np.int64)
        self.exponent: int | None = None
        self.low, self.high = math.inf, -math.inf

    def add(self, values: Float32) -> None:
        """Takes values of any shape.

        Raises:
            ArtifactError: One of them is not finite.
        """
        low, high = float(values.min()), float(values.max())
        if not math.isfinite(low) or not math.isfinite(high):  # a NaN makes both NaN
            raise ArtifactError(
                "the model gives activations that are not finite on the calibration images",
                expected="finite activations",
                fix="train or import the model again",
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        top = max(abs(self.low), abs(self.high))
        if top == 0 or not self._has_counts:
            return
        needed = math.ceil(math.log2(top / HALF))
        if self.exponent is None:
            self.exponent = needed
        while self.exponent < needed:
            self._widen()
        places = np.floor(values.ravel() * np.float32(2.0**-self.exponent)).astype(np.int32)
        places += HALF
        self.counts += np.bincount(np.clip(places, 0, 2 * HALF - 1), minlength=2 * HALF)

    def _widen(self) -> None:
        assert self.exponent is not None  # it was set when the first value was added
        pairs = self.counts.reshape(HALF, 2).sum(axis=1)
        self.counts[:] = 0
        self.counts[HALF // 2 : HALF // 2 + HALF] = pairs
        self.exponent += 1

    @property
    def width(self) -> float:
        """Of a bin."""
        return 2.0 ** (self.exponent or 0)

    @property
    def magnitudes(self) -> np.ndarray:
        """int64 (2,048): counts by distance from 0."""
        return np.asarray(self.counts[HALF:] + self.counts[:HALF][::-1])


def minmax(histogram: Histogram, settings: QuantizationSettings) -> Range:
    """Everything that was seen."""
    return histogram.low, histogram.high


def percentile(histogram: Histogram, settings: QuantizationSettings) -> Range:
    """What holds this percentage of the values: of magnitudes for int8, at either end for uint8."""
    share = settings.percentile / 100
    if settings.activations == "int8":
        top = _edge(histogram.magnitudes, share) * histogram.width
        return _within(histogram, -top, top)
    high = (_edge(histogram.counts, share) - HALF) * histogram.width
    low = -(_edge(histogram.counts[::-1], share) - HALF) * histogram.width
    return _within(histogram, low, high)


def entropy(histogram: Histogram, settings: QuantizationSettings) -> Range:
    """The threshold that loses the least information: least KL divergence of the 8-bit histogram from the whole one.

    Source: Migacz, 8-bit Inference with TensorRT, GTC 2017, slide 38.
    """
    counts = histogram.magnitudes.astype(np.float64)
    counts[0] = 0.0  # exact zeros (a ReLU's) are exact in 8 bits: they must not decide
    last = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 0
    if last <= LEVELS:
        return histogram.low, histogram.high
    candidates = range(LEVELS, last + ENTROPY_STRIDE, ENTROPY_STRIDE)
    best = min(candidates, key=lambda size: _divergence(counts, min(size, last)))
    top = min(best, last) * histogram.width
    return _within(histogram, -top, top)


METHODS: Mapping[str, Callable[[Histogram, QuantizationSettings], Range]] = {
    "minmax": minmax,
    "entropy": entropy,
    "percentile": percentile,
}


def calibrate(
    model: Any, tensors: Iterable[str], pixels: Pixels, spec: ImageSpec, settings: QuantizationSettings
) -> dict[str, Range]:
    """The range of each tensor over the pixels.

    Args:
        model: A prepared graph.
        tensors: Names of float values in it.
        pixels: Read once.
        spec: The model's ImageSpec.
        settings: Method, threads.

    Raises:
        ArtifactError: The model gives values that are not finite.
        DataError: As Pixels says.
    """
    session = Session(model, sorted(set(tensors)), spec, threads=settings.threads)
    histograms = {name: Histogram(has_counts=settings.calibration != "minmax") for name in session.names}
    for batch in pixels:
        for values in session.run(batch):
            for name, value in values.items():
                histograms[name].add(value)
    return {name: METHODS[settings.calibration](found, settings) for name, found in histograms.items()}


class Session:
    """A graph in ONNX Runtime that gives values from inside, a few images at a time.

    Args:
        model: A prepared graph; it is left as it is.
        names: The values to give.
        spec: The model's ImageSpec.
        threads: Of the engine.
    """

    def __init__(self, model: Any, names: Iterable[str], spec: ImageSpec, *, threads: int) -> None:
        import onnx
        import onnxruntime

        given = onnx.ModelProto()
        given.CopyFrom(model)
        image, names = given.graph.input[0], list(names)
        self.names = [name for name in names if name != image.name]
        self._image_too = image.name in names
        shapes = {value.name: value for value in given.graph.value_info}
        ends = {value.name for value in given.graph.output}
        per_image = 0
        for name in self.names:
            shape = [dim.dim_value or 1 for dim in shapes[name].type.tensor_type.shape.dim] if name in shapes else []
            per_image += 4 * math.prod(shape[1:])
            if name not in ends:
                given.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            given.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        fixed = self._session.get_inputs()[0].shape[0]
        self._fixed = fixed if isinstance(fixed, int) else None
        self._size = self._fixed or max(1, min(CHUNK, MOST_OUTPUT_BYTES // max(1, per_image)))
        self._takes_pixels = self._session.get_inputs()[0].type == "tensor(uint8)"
        self._spec = spec
        if self._image_too:
            self.names.append(image.name)

    def run(self, batch: Uint8) -> Iterator[dict[str, Float32]]:
        """The values of a batch, chunk by chunk; what fills a chunk of a fixed size up is cut off again."""
        wanted = [name for name in self.names if name != IMAGE]
        for start in range(0, len(batch), self._size):
            chunk = batch[start : start + self._size]
            count = len(chunk)
            if self._fixed is not None and len(chunk) < self._fixed:
                chunk = np.concatenate([chunk, np.repeat(chunk[-1:], self._fixed - len(chunk), axis=0)])
            x = chunk if self._takes_pixels else normalize(chunk, self._spec)
            values = dict(zip(wanted, self._session.run(wanted, {IMAGE: x}), strict=True)) if wanted else {}
            if self._image_too:
                values[IMAGE] = x
            yield {name: value[:count] for name, value in values.items()}


def _edge(counts: np.ndarray, share: float) -> int:
    """The number of bins, from the first, that hold at least this share of the counts."""
    total = np.cumsum(counts)
    return int(np.searchsorted(total, share * total[-1])) + 1


def _within(histogram: Histogram, low: float, high: float) -> Range:
    """A range that leaves what was seen only inward, and holds 0."""
    return max(min(low, 0.0), min(histogram.low, 0.0)), min(max(high, 0.0), max(histogram.high, 0.0))


def _divergence(counts: np.ndarray, size: int) -> float:
    """KL divergence of the first ``size`` bins (what lies beyond added to the last) from their 128-level form."""
    kept = counts[:size]
    whole = kept.copy()
    whole[-1] += counts[size:].sum()
    starts = (np.arange(LEVELS) * size) // LEVELS
    lengths = np.diff(np.append(starts, size))
    used = np.add.reduceat((kept > 0).astype(np.float64), starts)
    level = np.divide(np.add.reduceat(kept, starts), used, out=np.zeros(LEVELS), where=used > 0)
    coarse = np.where(kept > 0, np.repeat(level, lengths), 0.0)
    p, q = whole / whole.sum(), coarse / max(coarse.sum(), 1e-12)
    is_on = p > 0
    return float(np.sum(p[is_on] * np.log(p[is_on] / np.maximum(q[is_on], 1e-12))))
