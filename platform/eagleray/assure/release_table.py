"""The table of a release: each step with what it costs and what it saves, and the gates that it had to pass.

A step is compared with the parent, not with the step before it: losses that are each small may not add up unseen.

- ``accuracy``: the share of test images that are right may fall by so many points, as estimated or at the far end of
  its paired interval.
- ``classes``: no class may really lose more recall than that: its loss is over the limit and its interval leaves zero
  out, so that one image of a small class stops nothing.
- ``parity``: every engine answers the probe set as it should; ``infer.parity`` decides, the table keeps it.

Example:
    >>> [gate.is_passed for gate in judge(comparison, Limits(max_drop_points=0.5))]
    [True, True]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from eagleray.assure.comparison import Comparison
from eagleray.assure.phrases import count
from eagleray.vision.bootstrap import Estimate

ROUNDING = 1e-9  # of shares: 1 image of 200 is 0.5 points, not a hair more


@dataclass(frozen=True)
class Limits:
    """What a step may lose.

    Attributes:
        max_drop_points: Of the share of test images that are right, in points.
        max_class_drop_points: Of the recall of any class.
        gate_on: ``estimate``: the drop as found; ``bound``: the far end of its interval.
    """

    max_drop_points: float = 0.5
    max_class_drop_points: float = 5.0
    gate_on: Literal["estimate", "bound"] = "estimate"


@dataclass(frozen=True)
class Gate:
    """One gate: what was seen, what was allowed."""

    name: str
    is_passed: bool
    seen: str
    allowed: str


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """One row of the table: the parent, or what a step made of it.

    Attributes:
        name: Short; shown at its point.
        what: In words.
        model_digest: Of the bundle.
        architecture, precision: Of the bundle.
        accuracy: Share of the test images that are right.
        change: That minus the parent's; None of the parent.
        agreement: Share of images with the parent's answer.
        recalls: Change of each class's recall, by label id.
        model_bytes, parameters, macs: Of the model; None where they cannot be counted.
        engine: That the figures below are of.
        latency_ms_p50, latency_ms_p95: At batch 1.
        images_per_s, best_batch: At the best batch.
        speedup: Images a second over the parent's on its own best engine, measured in turns with it.
        core_s_per_image: Core-seconds with decoding, on the CPU; what the cost is made of.
        gates: What it had to pass.
        seconds: That making it took.
    """

    name: str
    what: str
    model_digest: str
    architecture: str
    precision: str
    accuracy: Estimate
    change: Estimate | None = None
    agreement: Estimate | None = None
    recalls: Mapping[str, Estimate] = field(default_factory=dict)
    model_bytes: int = 0
    parameters: int | None = None
    macs: int | None = None
    engine: str = ""
    latency_ms_p50: float = 0.0
    latency_ms_p95: float = 0.0
    images_per_s: float = 0.0
    best_batch: int = 0
    speedup: float | None = None
    core_s_per_image: float = 0.0
    gpu_s_per_image: float = 0.0
    gpu: str = ""
    gates: tuple[Gate, ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def is_passed(self) -> bool:
        """Whether every gate is passed."""
        return all(gate.is_passed for gate in self.gates)

    @property
    def worst_class(self) -> tuple[str, Estimate] | None:
        """The class that loses most recall; None where none loses."""
        found = min(self.recalls.items(), key=lambda item: item[1].value or 0.0, default=None)
        return found if found is not None and (found[1].value or 0.0) < 0 else None

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        value = dict(vars(self))
        for name in ("accuracy", "change", "agreement"):
            value[name] = None if value[name] is None else value[name].to_json()
        value["recalls"] = {label: figure.to_json() for label, figure in self.recalls.items()}
        value["gates"] = [vars(gate) for gate in self.gates]
        value["notes"] = list(self.notes)
        return {**value, "is_passed": self.is_passed}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StepRow:
        """What to_json wrote."""
        rest = {key: item for key, item in value.items() if key != "is_passed"}
        for name in ("accuracy", "change", "agreement"):
            rest[name] = None if rest[name] is None else Estimate(**rest[name])
        rest["recalls"] = {label: Estimate(**figure) for label, figure in rest["recalls"].items()}
        rest["gates"] = tuple(Gate(**gate) for gate in rest["gates"])
        return cls(**{**rest, "notes": tuple(rest["notes"])})

    def with_gates(self, *gates: Gate) -> StepRow:
        """With further gates."""
        return replace(self, gates=(*self.gates, *gates))


def judge(found: Comparison, limits: Limits) -> tuple[Gate, Gate]:
    """The gates on accuracy and on classes.

    Args:
        found: The parent first, the step second.
        limits: What may be lost.
    """
    return _accuracy(found, limits), _classes(found, limits)


def _accuracy(found: Comparison, limits: Limits) -> Gate:
    figure = found.differences[found.lead]
    drop = -100 * (figure.value or 0.0)
    bounds = ""
    judged = drop
    if figure.low is not None and figure.high is not None:
        bounds = f" ({-100 * figure.high:.2f} to {-100 * figure.low:.2f})"
        judged = -100 * figure.low if limits.gate_on == "bound" else drop
    elif limits.gate_on == "bound":
        judged = float("inf")  # there is no interval: nothing is shown
    images = count(found.resampling.num_images, "image")
    which = "the far end of the drop" if limits.gate_on == "bound" else "the drop"
    return Gate(
        "accuracy",
        judged <= limits.max_drop_points + ROUNDING,
        f"a drop of {drop:.2f} points{bounds} on {images}",
        f"{which} at most {limits.max_drop_points:g} points",
    )


def _classes(found: Comparison, limits: Limits) -> Gate:
    lost = {
        label: -100 * figure.value
        for label, figure in found.recalls.items()
        if figure.value is not None and figure.high is not None and figure.high < 0
    }
    over = {label: loss for label, loss in lost.items() if loss > limits.max_class_drop_points + ROUNDING}
    worst = sorted(over.items(), key=lambda item: -item[1])
    seen = ", ".join(f"{label} loses {loss:.1f}" for label, loss in worst[:3]) or "no class really loses more"
    if not over and lost:
        label, loss = max(lost.items(), key=lambda item: item[1])
        seen = f"{label} loses most: {loss:.1f}"
    return Gate("classes", not over, seen, f"no class really loses more than {limits.max_class_drop_points:g} points")
