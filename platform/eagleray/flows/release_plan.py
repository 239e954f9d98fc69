"""What a release is asked to do, resolved: the config, the steps in their fixed order, each with what it depends on.

The order is fixed, for each step wants what the one before it leaves: a smaller architecture is trained before it is
pruned, a pruned one is trained before it is quantised, an engine is asked last.

Example:
    >>> [step.name for step in steps(ReleaseConfig(model="B", corpus="C", out="B2", prune=0.3, precision="int8"))]
    ['prune', 'quantize']
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from eagleray.assure.release_table import Limits
from eagleray.core.config import Config
from eagleray.flows.scoring_place import RuntimeName
from eagleray.infer.runtimes import RUNTIMES
from eagleray.vision.bundle import HEAD, SAFETENSORS, ModelBundle, load_bundle
from eagleray.vision.splits import SplitRule

STUDENT = {"epochs": 30, "lr": 5e-4}  # of a student: it starts from other weights
RECOVERY = {"epochs": 10, "lr": 2e-4, "warmup_epochs": 0.5}  # after pruning: the weights are nearly right


class ReleaseConfig(Config):
    """What to make of a bundle, by which images, to where; the rest says how.

    Attributes:
        model: The parent: a bundle's folder.
        corpus: A corpus with labels: trains, calibrates, judges, each by a split of its own.
        out: The bundle to write; what was made on the way, the table and the page are in ``run_dir``.
        run_dir: Default ``OUT.run``.
        distill_to: A timm architecture or a bundle that becomes the student; none: no distillation.
        prune: Share of the multiply-adds to take out; none: no pruning.
        precision: ``fp16`` or ``int8``; none: as it is.
        target: The engine that it is made for; none: the fastest here.
        max_drop_points: The share of test images that are right may fall by so many points below the parent's.
        max_class_drop_points: No class may really lose more recall than that.
        gate_on: ``estimate``: the drop as found; ``bound``: the far end of its interval, which wants many images.
        split, train_split: Which images judge, and which train and calibrate; they share none.
        splits: How the corpus is split where it has no ``split`` column, and what must not straddle.
        student, recovery: Keys of FinetuneConfig for the student's training, and for that after pruning.
        pruning, quantization: Keys of PruneConfig and of infer.quantization.QuantizationSettings.
        calibration_images: Of ``train_split``, for int8; as many others choose which layers stay in float.
        resamples, level, seed: Of the intervals.
        rounds, turn_s, threads: Of the timing.
        engines: Only these are timed; empty: every engine that is here and can run the bundle.
        runtime, address, workers, num_cpus, num_gpus, batch_size, in_process_below: As in ``score``.
        has_report: Write report.html.
    """

    model: str
    corpus: str
    out: str = Field(min_length=1)
    run_dir: str | None = None
    distill_to: str | None = Field(None, min_length=1)
    prune: float | None = Field(None, gt=0, lt=1)
    precision: Literal["fp16", "int8"] | None = None
    target: Literal["onnx", "openvino", "tensorrt"] | None = None
    max_drop_points: float = Field(0.5, ge=0)
    max_class_drop_points: float = Field(5.0, ge=0)
    gate_on: Literal["estimate", "bound"] = "estimate"
    split: str = Field("test", min_length=1)
    train_split: str = Field("train", min_length=1)
    splits: SplitRule = Field(default_factory=SplitRule)
    student: dict[str, Any] = Field(default_factory=dict)
    recovery: dict[str, Any] = Field(default_factory=dict)
    pruning: dict[str, Any] = Field(default_factory=dict)
    quantization: dict[str, Any] = Field(default_factory=dict)
    calibration_images: int = Field(256, ge=1)
    resamples: int = Field(1000, ge=0)
    level: float = Field(0.95, gt=0, lt=1)
    seed: int = Field(0, ge=0)
    rounds: int = Field(5, ge=1)
    turn_s: float = Field(0.3, gt=0)
    threads: int = Field(1, ge=1)
    engines: tuple[str, ...] = ()
    runtime: RuntimeName = "auto"
    address: str | None = None
    workers: int = Field(0, ge=0)
    num_cpus: float = Field(1.0, gt=0)
    num_gpus: float = Field(0.0, ge=0)
    batch_size: int = Field(32, ge=1, le=4096)
    in_process_below: int = Field(256, ge=0)
    has_report: bool = True

    @field_validator("engines")
    @classmethod
    def _known_engines(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in value if name not in RUNTIMES]
        if unknown:
            raise ValueError(f"unknown engines {', '.join(unknown)}; any of {', '.join(RUNTIMES)}")
        return value

    @model_validator(mode="after")
    def _asks_for_something(self) -> ReleaseConfig:
        if self.target and self.engines and self.target not in self.engines:
            raise ValueError(f"target {self.target} is not among the engines that are timed: {', '.join(self.engines)}")
        if not (self.distill_to or self.prune or self.precision or self.target):
            raise ValueError("nothing is asked for: give distill_to, prune, precision or target, or several of them")
        if self.split == self.train_split:
            raise ValueError(f"split and train_split are both {self.split!r}: what judges may not train or calibrate")
        return self

    @property
    def root(self) -> Path:
        """The run's folder."""
        return Path(self.run_dir or f"{self.out.rstrip('/')}.run")

    @property
    def device(self) -> str:
        """Where engines run."""
        return "cuda" if self.num_gpus > 0 else "cpu"

    def runtime_for(self, bundle: ModelBundle) -> str:
        """What scores a bundle: the target, else as asked; ``auto`` for torch where there is only a graph."""
        runtime = self.target or self.runtime
        return "auto" if runtime == "torch" and SAFETENSORS not in bundle.files else runtime

    @property
    def limits(self) -> Limits:
        """What a step may lose."""
        return Limits(self.max_drop_points, self.max_class_drop_points, self.gate_on)


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: Of release_steps.STEPS.
        title: Short, for the table: ``prune 30 %``.
        what: In words.
        settings: All that its result depends on, besides the bundle and the corpus.
    """

    name: str
    title: str
    what: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def _student(name: str) -> str:
    """An architecture by its name, a bundle by its weights."""
    return load_bundle(name).model_digest if (Path(name) / HEAD).is_file() else name


def steps(config: ReleaseConfig) -> list[Step]:
    """The steps that are asked for, in their order."""
    common = {"seed": config.seed, "train_split": config.train_split, "splits": config.splits.model_dump(mode="json")}
    found = []
    if config.distill_to:
        settings = {**common, "student": {**STUDENT, **config.student}, "distill_to": _student(config.distill_to)}
        what = f"a student {config.distill_to} learns from the model and from the labels"
        found.append(Step("distill", f"student {config.distill_to}", what, settings))
    if config.prune:
        recovery = {**RECOVERY, **config.recovery}
        settings = {**common, "ratio": config.prune, "pruning": config.pruning, "recovery": recovery}
        what = f"channels are taken out until {config.prune:.0%} of the multiply-adds are gone, then it is trained"
        found.append(Step("prune", f"pruned {config.prune:.0%}", what, settings))
    if config.precision == "int8":
        settings = {**common, "images": config.calibration_images, "quantization": config.quantization}
        # the split that judges too: which images choose what stays in float depends on it
        settings |= {"max_drop_points": config.max_drop_points, "target": config.target, "split": config.split}
        what = "weights and activations become 8-bit integers, layers that suffer stay in float"
        found.append(Step("quantize", "int8", what, settings))
    if config.precision == "fp16":
        found.append(Step("fp16", "fp16", "weights and activations become 16-bit floats"))
    if config.target:
        what = f"{config.target} compiles it and answers its probe set"
        found.append(Step("target", f"on {config.target}", what, {"target": config.target}))
    return found
