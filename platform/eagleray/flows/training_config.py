"""What every training run is told, in one place: the data, the optimizer, where it runs, when it reports and saves.

PretrainConfig and FinetuneConfig add what is theirs. What changes the result makes the run's key, which a checkpoint
carries: a checkpoint of another key is refused. What only says where or how often (``ELSEWHERE``) may change at a
resume.

Example:
    >>> PretrainConfig(corpus="corpora/photos", method="simclr", backbone="resnet18", out="bundles/ssl").workers
    0
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from eagleray.core.config import Config
from eagleray.flows.pool import cores
from eagleray.vision.splits import SplitRule

if TYPE_CHECKING:
    from eagleray.learn.feeding import FeedSettings
    from eagleray.learn.training import TrainSettings

AUTO = "auto"
ELSEWHERE = (  # change no weight, or only as another number of workers or threads does: by the order of sums
    *("out", "run_dir", "address", "workers", "num_cpus", "num_gpus", "threads", "decode_threads", "prefetch", "data"),
    *("resume", "max_failures", "resize_check_s", "report_every_s", "checkpoint_every_s", "checkpoint_every_steps"),
    *("keep_checkpoints", "has_report", "probe_images", "corpus", "judge", "runtime", "allow_leaks", "allow_missing"),
    # what is held out changes the images, and what keeps the best is in the key of a run that does
    *("validate_on", "validate_share", "validate_every_epochs", "keep"),
)


class TrainingConfig(Config):
    """What to train on, how, where.

    Attributes:
        corpus: A corpus.
        out: The bundle's folder; what the run leaves besides is in ``run_dir``.
        run_dir: Checkpoints, metrics, events, page; default ``OUT.run``.
        split: Which images: a split's name, ``all``, or ``auto``.
        splits: How the corpus is split where it has no ``split`` column, and what must not straddle.
        allow_leaks: Go on although an image or a group stands in two splits.
        size_px: Side of the square input; none = the model's own.
        epochs, max_steps, batch_size, accumulation, precision, clip_norm, ema_decay, channels_last, compiles, seed: As
            in learn.training.TrainSettings.
        optimizer, lr, base_batch, weight_decay, weight_decay_end, momentum, warmup_epochs, min_lr_ratio: As in
            learn.optimization.OptimizerSettings; ``optimizer`` is its name.
        window_shards: Shards whose images are mixed.
        workers: Workers on Ray, or (fewest, most) to follow what the cluster has; 0 = in this process, without Ray.
        num_cpus, num_gpus: What a worker holds; above 0 GPUs it trains on CUDA.
        address: A Ray cluster; default RAY_ADDRESS, else an embedded one.
        data: Where images are decoded and cropped: ``worker`` (on its threads), ``ray`` (Ray Data tasks, where CPUs
            are), ``auto`` (ray where a worker has a GPU).
        threads: Of torch; 0 = one per core in process, one per CPU held on Ray.
        decode_threads: In the worker; none = one per core or CPU held, 0 = in turn with the training.
        prefetch: Batches made ahead.
        resume: ``auto`` goes on from the newest good checkpoint, ``never`` lays an earlier run aside.
        max_failures: Worker failures that Ray Train answers by a restart from the newest checkpoint; -1 = any number.
        resize_check_s: How often an elastic run looks whether the cluster has changed.
        report_every_s, checkpoint_every_s, checkpoint_every_steps, keep_checkpoints: When, and how many stay.
        probe_images: Of which the bundle's probe set is: sixteen of the corpus, which travel with the bundle, or
            ``generated`` ones, where no image of the corpus may leave.
        has_report: Write report.html.
    """

    corpus: str
    out: str = Field(min_length=1)
    run_dir: str | None = None
    split: str = Field(AUTO, min_length=1)
    splits: SplitRule = Field(default_factory=SplitRule)
    allow_leaks: bool = False
    size_px: int | None = Field(None, ge=16, le=4096)
    epochs: int = Field(10, ge=1)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(256, ge=2)
    accumulation: int = Field(1, ge=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    clip_norm: float | None = Field(None, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    channels_last: bool = True
    compiles: bool = False
    seed: int = Field(0, ge=0)
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    base_batch: int | None = Field(256, ge=1)
    weight_decay: float = Field(0.05, ge=0)
    weight_decay_end: float | None = Field(None, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    warmup_epochs: float = Field(1.0, ge=0)
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    window_shards: int = Field(4, ge=1)
    workers: int | tuple[int, int] = 0
    num_cpus: float = Field(1.0, gt=0)
    num_gpus: float = Field(0.0, ge=0)
    address: str | None = None
    data: Literal["auto", "worker", "ray"] = "auto"
    threads: int = Field(0, ge=0)
    decode_threads: int | None = Field(None, ge=0)
    prefetch: int = Field(2, ge=1)
    resume: Literal["auto", "never"] = "auto"
    max_failures: int = Field(32, ge=-1)
    resize_check_s: float = Field(60.0, ge=0)
    report_every_s: float = Field(5.0, ge=0)
    checkpoint_every_s: float = Field(300.0, gt=0)
    checkpoint_every_steps: int | None = Field(None, ge=1)
    keep_checkpoints: int = Field(2, ge=2)
    probe_images: Literal["corpus", "generated"] = "corpus"
    has_report: bool = True

    @field_validator("workers", mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        """Takes "2" and "1,4" as a command line gives them."""
        if isinstance(value, str):
            numbers = [int(part) for part in value.split(",")]
            return numbers[0] if len(numbers) == 1 else tuple(numbers)
        return value

    @field_validator("workers")
    @classmethod
    def _sensible(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if value[0] < 1 or value[0] > value[1] if isinstance(value, tuple) else value < 0:
            raise ValueError("a number from 0, or the fewest (from 1) and the most, e.g. 1,4")
        return value

    @model_validator(mode="after")
    def _divides(self) -> TrainingConfig:
        """Every world size that the run may have gets whole shares of a batch: found now, not at a resize."""
        low, high = self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)
        parts = math.lcm(*range(max(1, low), high + 1)) * self.accumulation if high else self.accumulation
        if self.batch_size % parts:
            near = max(1, round(self.batch_size / parts)) * parts
            shares = f"{low} to {high} workers" if low < high else f"{max(1, high)} workers"
            raise ValueError(
                f"batch_size {self.batch_size} does not divide among {shares} x {self.accumulation} accumulations; "
                f"give a multiple of {parts}, e.g. {near}"
            )
        return self

    @property
    def run_folder(self) -> Path:
        """Where the run leaves what is not the bundle."""
        return Path(self.run_dir or f"{self.out.rstrip('/')}.run")

    @property
    def is_on_ray(self) -> bool:
        """Whether workers are Ray's."""
        return self.workers != 0

    @property
    def is_fed_by_ray(self) -> bool:
        """Whether images are decoded in Ray Data tasks."""
        return self.data == "ray" or (self.data == AUTO and self.is_on_ray and self.num_gpus > 0)

    def key_fields(self) -> dict[str, Any]:
        """What changes the result, as JSON values; the data's digest comes beside it."""
        return self.model_dump(mode="json", exclude=set(ELSEWHERE))


def absolute(config: TrainingConfig) -> dict[str, Any]:
    """The config as JSON values, local paths absolute: Ray Train's workers have a working folder of their own."""
    values = config.model_dump(mode="json")
    values["run_dir"] = str(config.run_folder.resolve())
    for name in ("corpus", "out", "parent", "teacher"):
        text = values.get(name)
        if isinstance(text, str) and Path(text).exists():
            values[name] = str(Path(text).resolve())
    return values


def held_cores(config: TrainingConfig) -> int:
    """Cores that one worker may use."""
    return max(1, int(config.num_cpus)) if config.is_on_ray else cores()


def train_settings(config: TrainingConfig) -> TrainSettings:
    """What the loop is told."""
    from eagleray.learn.optimization import OptimizerSettings
    from eagleray.learn.training import TrainSettings

    optimizer = OptimizerSettings(name=config.optimizer, **_fields(config, OptimizerSettings, exclude=("name",)))
    return TrainSettings(optimizer=optimizer, **_fields(config, TrainSettings, exclude=("optimizer",)))


def feed_settings(config: TrainingConfig, *, keeps_last: bool) -> FeedSettings:
    """What the feed is told."""
    from eagleray.learn.feeding import FeedSettings

    return FeedSettings(
        batch_size=config.batch_size,
        seed=config.seed,
        window_shards=config.window_shards,
        keeps_last=keeps_last,
        num_threads=held_cores(config) if config.decode_threads is None else config.decode_threads,
        prefetch=config.prefetch,
    )


def _fields(config: TrainingConfig, kind: type[Config], exclude: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """The fields that a setting of learn/ shares with the config, by name."""
    names = set(kind.model_fields) & set(type(config).model_fields) - set(exclude)
    return {name: getattr(config, name) for name in names}
