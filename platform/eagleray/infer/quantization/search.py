"""Which layers stay float: as few as bring the accuracy back inside the budget, by measurement and nothing else.

Layers are ranked by what each does alone to the logits (signal to noise with only it in 8 bits). The worst 0, 1, 2, 4,
... are left float until the drop fits, then the number is halved back as far as it still fits. What is returned was
itself evaluated. Ranking costs nothing where all layers may be quantised, the usual case.

Example:
    >>> found = search(layers, build=build, rank=rank, evaluate=evaluate, parent=data, settings=settings)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eagleray.core.errors import KpiNotMet
from eagleray.infer.quantization.calibration import Pixels, Session
from eagleray.infer.quantization.graph import Layer
from eagleray.infer.quantization.settings import QuantizationSettings, Step
from eagleray.infer.runtimes import Float32
from eagleray.vision.images import ImageSpec
from eagleray.vision.onnx_graph import LOGITS

Build = Callable[[frozenset[str]], bytes]  # of the layers to leave float
Evaluate = Callable[[bytes], float]
EPSILON_POINTS = 1e-9  # a drop that equals the budget is inside it, whatever floats make of it
NO_NOISE_DB = 200.0


@dataclass(frozen=True)
class Found:
    """The end of a search.

    Attributes:
        data: The accepted graph.
        is_float: Names of layers that stay float.
        before: The parent's accuracy, 0..1.
        after: The accepted graph's.
        steps: Every measurement.
        sqnr_db: Layer to what it alone does; empty when it was not needed.
    """

    data: bytes
    is_float: frozenset[str]
    before: float
    after: float
    steps: tuple[Step, ...]
    sqnr_db: Mapping[str, float] = field(default_factory=dict)


def search(
    layers: Sequence[Layer],
    *,
    build: Build,
    rank: Callable[[], Mapping[str, float]],
    evaluate: Evaluate,
    parent: bytes,
    settings: QuantizationSettings,
) -> Found:
    """Quantises as many layers as the budget of accuracy allows.

    Args:
        layers: Those that may be quantised; settings.keep_float is off it already.
        build: Gives the graph with these of them left float.
        rank: Gives the signal to noise of the logits, in dB, for each layer alone; called once, when it is needed.
        evaluate: Accuracy, 0..1, of a graph.
        parent: The float graph.
        settings: max_drop_points, max_float_share, max_evaluations.

    Raises:
        KpiNotMet: No graph inside the limits keeps the accuracy.
    """
    trial = _Trial(build, evaluate, evaluate(parent), settings)
    if trial.fits(frozenset()):
        return trial.end({})
    sqnr = dict(rank())
    order = sorted((layer.name for layer in layers), key=lambda name: sqnr[name])  # stable: the graph's order in ties
    most = int(settings.max_float_share * len(order))
    failed = number = 0
    for number in _doubling(most):
        if not trial.has_budget or trial.fits(frozenset(order[:number])):
            break
        failed = number
    if trial.accepted is None:
        raise _not_met(trial, len(order), most)
    while number - failed > 1 and trial.has_budget:
        middle = (number + failed) // 2
        if trial.fits(frozenset(order[:middle])):
            number = middle
        else:
            failed = middle
    return trial.end(sqnr)


def _doubling(most: int) -> list[int]:
    """1, 2, 4, ... and ``most`` itself."""
    sizes = {1 << power for power in range(most.bit_length())} | {most}
    return sorted(size for size in sizes if 0 < size <= most)


class _Trial:
    """Builds and evaluates candidates, and remembers the last one that fits."""

    def __init__(self, build: Build, evaluate: Evaluate, before: float, settings: QuantizationSettings) -> None:
        self._build, self._evaluate, self.before, self.settings = build, evaluate, before, settings
        self.steps: list[Step] = []
        self.accepted: tuple[bytes, frozenset[str], float] | None = None

    @property
    def has_budget(self) -> bool:
        """Whether one more evaluation is allowed; the parent's counts."""
        return len(self.steps) + 1 < self.settings.max_evaluations

    def fits(self, is_float: frozenset[str]) -> bool:
        """Whether the graph with these layers float keeps the accuracy."""
        start = time.perf_counter()
        data = self._build(is_float)
        accuracy = self._evaluate(data)
        drop = 100 * (self.before - accuracy)
        self.steps.append(Step(len(is_float), accuracy, drop, time.perf_counter() - start))
        if drop > self.settings.max_drop_points + EPSILON_POINTS:
            return False
        self.accepted = (data, is_float, accuracy)
        return True

    def end(self, sqnr: Mapping[str, float]) -> Found:
        """What was accepted."""
        assert self.accepted is not None
        data, is_float, after = self.accepted
        return Found(data, is_float, self.before, after, tuple(self.steps), sqnr)


def rank(
    model: Any,
    layers: Sequence[Layer],
    alone: Callable[[str], Any],
    *,
    pixels: Pixels,
    spec: ImageSpec,
    threads: int,
) -> dict[str, float]:
    """Signal to noise of the logits, in dB, with each layer alone in 8 bits; lower is more sensitive.

    Args:
        model: The float graph.
        layers: Those to rank.
        alone: Gives the graph with only the layer of this name in 8 bits.
        pixels: What it is asked.
        spec: The bundle's preprocessing.
        threads: Of the engine.
    """
    reference = _logits(model, pixels, spec, threads)
    return {layer.name: sqnr_db(reference, _logits(alone(layer.name), pixels, spec, threads)) for layer in layers}


def sqnr_db(reference: Float32, found: Float32) -> float:
    """10 log10 of signal over noise: sum(reference^2) / sum((found - reference)^2)."""
    signal = float(np.sum(np.square(reference, dtype=np.float64)))
    noise = float(np.sum(np.square(found.astype(np.float64) - reference)))
    if noise == 0 or signal == 0:
        return NO_NOISE_DB if noise == 0 else -NO_NOISE_DB
    return float(10 * np.log10(signal / noise))


def _logits(model: Any, pixels: Pixels, spec: ImageSpec, threads: int) -> Float32:
    session = Session(model, [LOGITS], spec, threads=threads)
    return np.concatenate([values[LOGITS] for values in session.run(pixels.kept)])


def _not_met(trial: _Trial, num_layers: int, most: int) -> KpiNotMet:
    best = min(trial.steps, key=lambda step: step.drop_points)
    settings = trial.settings
    why = (
        f"{settings.max_evaluations} evaluations were allowed"
        if not trial.has_budget
        else f"{most} of {num_layers} layers may stay float"
    )
    return KpiNotMet(
        f"8 bits cost {best.drop_points:.2f} points at best ({trial.before:.4f} to {best.accuracy:.4f}, with "
        f"{best.num_float} of {num_layers} layers float), and max_drop_points={settings.max_drop_points:g}; {why}",
        expected="an accuracy inside the budget",
        fix="calibrate on images like those to be seen, try calibration=percentile or activations=uint8, raise "
        "max_float_share, max_evaluations or max_drop_points, or release fp16",
    )
