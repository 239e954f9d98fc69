"""The one training loop: any task, any batches, on one device or several workers, resumable at every step.

Knows no Ray, writes no checkpoint by itself and prints nothing: hooks do. All that is random in a step comes from
(seed, step, rank), so a run that goes on from a checkpoint is, on the CPU with the same world size, bit for bit the run
that was not stopped; with another world size it sees the same global batches.

A task may have, besides what ``task.Task`` says, ``before_step(progress)``: called before every step, also the first
after a resume, e.g. to freeze and thaw parameters. On the CPU it is deep-copied once, to see what a step needs.

Example:
    >>> result = train(task, batches, TrainSettings(epochs=10), hooks=Hooks(on_report=lambda r: log.info(r.line())))
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import nn

from eagleray.core.config import Config
from eagleray.core.errors import CapabilityError, ConfigError
from eagleray.learn import divergence, memory, parallel
from eagleray.learn.averaging import Average, as_kept
from eagleray.learn.batch_tensors import Tensors, channels_last, on_device, parts
from eagleray.learn.checkpoints import Checkpoint
from eagleray.learn.feeding import Batch, BatchSource
from eagleray.learn.optimization import OptimizerSettings, load_optimizer, make_optimizer, set_rates
from eagleray.learn.order import Position, check_world, mixed
from eagleray.learn.reports import Meter, StepReport
from eagleray.learn.task import Progress, StepOutput, Task
from eagleray.learn.validation import Answering, Validation

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainSettings(Config):
    """How a task is trained.

    Attributes:
        epochs: Passes over the data.
        max_steps: Optimizer steps of the run, where epochs do not say it.
        batch_size: Images an optimizer step, over all workers and accumulations; that of the batches.
        accumulation: Parts that a worker's share of a batch is cut into; gradients add up over them.
        precision: ``bf16`` and ``fp16`` run under autocast; fp16 with a gradient scaler, on CUDA only.
        clip_norm: Largest norm of all gradients together; None: as they are.
        ema_decay: Of the moving average of the weights; None: none is kept.
        channels_last: Lay images and weights out channels last: faster convolutions on most devices.
        compiles: torch.compile the backbone (or what the task's ``compile`` says): minutes at the start of a long run.
        seed: Of everything random.
        optimizer: See OptimizerSettings.
        report_every_s: Seconds between reports.
        checkpoint_every_s: Seconds between checkpoints; the last step has one always.
        checkpoint_every_steps: Steps between checkpoints, beside those by time; None: by time only.
    """

    epochs: int = Field(10, ge=1)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(256, ge=1)
    accumulation: int = Field(1, ge=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    clip_norm: float | None = Field(None, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    channels_last: bool = True
    compiles: bool = False
    seed: int = Field(0, ge=0)
    optimizer: OptimizerSettings = OptimizerSettings()
    report_every_s: float = Field(5.0, ge=0)
    checkpoint_every_s: float = Field(300.0, gt=0)
    checkpoint_every_steps: int | None = Field(None, ge=1)


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the loop calls; on several workers every rank calls each at the same step.

    Attributes:
        prepare: (batch on the device, epoch) to the batch that the task sees, e.g. the photometric part of views.
        on_step: After every optimizer step, with the last part's output: probes, collapse detectors.
        on_report: Every few seconds and at the end.
        on_checkpoint: With a function that captures the state; call it on the ranks that keep one.
        should_stop: Asked after every step: a preemption notice, Ctrl-C. The run then checkpoints and returns.
        validation: Measures at the ends of epochs; a report follows. The task then answers, see ``Answering``.
        folder: The run's folder: where the batch of a diverged step is kept.
        config: What the run is, as JSON values, for its checkpoints.
    """

    prepare: Callable[[Tensors, int], Tensors] | None = None
    on_step: Callable[[Progress, StepOutput], None] | None = None
    on_report: Callable[[StepReport], None] | None = None
    on_checkpoint: Callable[[Callable[[], Checkpoint], Progress], None] | None = None
    should_stop: Callable[[], bool] | None = None
    validation: Validation | None = None
    folder: Path | None = None
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        progress: Of the step that would come next.
        position: Of the data then.
        is_finished: False when it was told to stop before its last step.
        report: The last one.
        average: State dict of the averaged weights; None when none was kept.
    """

    progress: Progress
    position: Position
    is_finished: bool
    report: StepReport
    average: dict[str, torch.Tensor] | None


def train(
    task: nn.Module,
    batches: BatchSource,
    settings: TrainSettings,
    *,
    hooks: Hooks | None = None,
    device: str | torch.device = "cpu",
    start: Checkpoint | None = None,
) -> TrainResult:
    """Trains a task to the end of its run, or until it is told to stop.

    Args:
        task: An nn.Module that is a Task; it is moved to the device and trained in place.
        batches: Where data comes from.
        settings: See TrainSettings.
        hooks: See Hooks.
        device: Of this worker.
        start: Where to go on; None: from the beginning.

    Raises:
        TrainingDiverged: The loss is not finite; the batch is kept in ``hooks.folder``.
        CapabilityError: The batch does not fit the memory, or the device has no fp16.
        ConfigError: The batch does not divide among workers and accumulations.
    """
    check_world(settings.batch_size, parallel.world_size(), settings.accumulation)
    place = torch.device(device)
    if settings.precision == "fp16" and place.type != "cuda":
        raise CapabilityError(
            f"fp16 on {place.type}", expected="a CUDA GPU for fp16", fix="give precision=bf16, or fp32"
        )
    loop = _Loop(task, batches, settings, hooks or Hooks(), place)
    if start is not None:
        loop.restore(start)
    devices = [place] if place.type == "cuda" else []
    # the caller's generator stays as it was
    with memory.kept_for_reuse(place), torch.random.fork_rng(devices=devices):
        return loop.run()


class _Loop:
    """The state of a run between two steps."""

    def __init__(
        self, task: nn.Module, batches: BatchSource, settings: TrainSettings, hooks: Hooks, device: torch.device
    ) -> None:
        self.batches, self.settings, self.hooks, self.device = batches, settings, hooks, device
        self.module = task.to(device)
        if settings.channels_last:
            self.module = self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.task = cast(Task, self.module)
        self.optimizer = make_optimizer(
            self.task.parameter_groups(), settings.optimizer, batch_size=settings.batch_size
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.average = Average(self.module, settings.ema_decay) if settings.ema_decay else None
        per_epoch = batches.steps_per_epoch
        num_steps = settings.max_steps or settings.epochs * per_epoch
        self.progress, self.position = Progress(0, num_steps, 0, per_epoch), Position()
        self.meter = Meter(settings.report_every_s, self.device)
        self.saved_s = time.monotonic()
        self.bad_part: int | None = None
        self.is_checked = False

    def restore(self, start: Checkpoint) -> None:
        """Goes on from a checkpoint."""
        self.progress, self.position = start.progress, start.position
        self.module.load_state_dict(start.state["model"])
        load_optimizer(self.optimizer, start.state["optimizer"])
        self.scaler.load_state_dict(start.state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(start.state["ema"])
        if self.hooks.validation is not None and "validation" in start.state:
            self.hooks.validation.load_state_dict(start.state["validation"])

    def capture(self) -> Checkpoint:
        """The state as a checkpoint."""
        state: dict[str, Any] = {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        if self.average is not None:
            state["ema"] = self.average.state_dict()
        metrics: Mapping[str, float] = {}
        if self.hooks.validation is not None:
            state["validation"] = self.hooks.validation.state_dict()
            metrics = self.hooks.validation.metrics(self.progress)
        config = self.hooks.config or {}
        return Checkpoint(progress=self.progress, position=self.position, config=config, state=state, metrics=metrics)

    def run(self) -> TrainResult:
        """Steps until the end or until told to stop."""
        self.module.train()
        if self.settings.compiles:
            is_own = type(self.module).compile is not nn.Module.compile
            (self.module if is_own else getattr(self.module, "backbone", self.module)).compile()
        getattr(self.task, "before_step", _nothing)(self.progress)
        step = parallel.wrap(self.task)
        taking = parallel.trainable(self.module)
        is_stopped = False
        if self._validate():  # of a run that was stopped before it could
            self._report()
            self._checkpoint(is_due=False)
        feed = self.batches.iterate(self.position)
        try:
            while self.progress.step < self.progress.num_steps and not is_stopped:
                with self.meter.waiting():
                    batch = next(feed)
                self._at(batch)
                self._check_size(batch)
                getattr(self.task, "before_step", _nothing)(self.progress)
                if parallel.trainable(self.module) != taking:
                    step, taking = parallel.wrap(self.task), parallel.trainable(self.module)
                is_stopped = self._step(step, batch)
        finally:
            getattr(feed, "close", _nothing)()
        report = self._report() if self.meter.has_steps else self.meter.report(self.progress)
        average = None if self.average is None else self.average.state
        return TrainResult(self.progress, self.position, self.progress.step >= self.progress.num_steps, report, average)

    def _at(self, batch: Batch) -> None:
        self.progress = Progress(
            self.progress.step, self.progress.num_steps, batch.epoch, self.progress.steps_per_epoch
        )

    def _check_size(self, batch: Batch) -> None:
        size = self.settings.batch_size
        is_whole = self.progress.step == 0 and self.progress.steps_per_epoch > 1
        if batch.num_images > size or (is_whole and batch.num_images != size):
            raise ConfigError(
                f"batches of {batch.num_images} images, batch_size={size}",
                expected="one size: the learning rate goes by it",
                fix="give the loop and the batches the same batch_size",
            )

    def _step(self, step: nn.Module, batch: Batch) -> bool:
        """One optimizer step; True when the run is to stop."""
        settings, progress = self.settings, self.progress
        lr = set_rates(self.optimizer, settings.optimizer, progress, batch_size=settings.batch_size)
        loss, output = self._gradients(step, batch)
        asked = self.hooks.should_stop is not None and self.hooks.should_stop()
        is_due = time.monotonic() - self.saved_s >= settings.checkpoint_every_s
        own = parallel.Votes(
            loss=loss * batch.weight,
            is_bad=float(not math.isfinite(loss)),
            stops=float(asked),
            saves=float(is_due),
            reports=float(self.meter.is_due()),
        )
        votes = parallel.vote(own, self.device)
        if votes.is_bad:
            raise divergence.diverged(loss, progress, self._keep_bad_part(batch))
        self._apply()
        self.task.after_step(progress)
        if self.average is not None:
            self.average.update(self.module)
        self.position = batch.position
        self.progress = Progress(progress.step + 1, progress.num_steps, progress.epoch, progress.steps_per_epoch)
        if self.hooks.on_step is not None:
            self.hooks.on_step(self.progress, output)
        self.meter.add(batch.num_images, votes.loss / parallel.world_size(), lr, output.logs)
        is_end = self.progress.step == self.progress.num_steps
        is_news = (is_end or not votes.stops) and self._validate()  # before the end, one that stops does it on resuming
        if votes.reports or is_news:
            self._report()
        self._checkpoint(is_due=bool(votes.saves or votes.stops))
        return bool(votes.stops)

    def _report(self) -> StepReport:
        report = self.meter.report(self.progress)
        if self.hooks.on_report is not None:
            self.hooks.on_report(report)
        return report

    def _validate(self) -> bool:
        """Measures the weights as they would be kept, where that is due; whether it did."""
        validation = self.hooks.validation
        if validation is None or not validation.is_due(self.progress):
            return False
        with as_kept(self.module, self.average), self._autocast():
            validation.measure(cast(Answering, self.module), self.progress, self.device)
        return True

    def _gradients(self, step: nn.Module, batch: Batch) -> tuple[float, StepOutput]:
        """Backward through every part of the batch; the mean loss and the last part's output."""
        settings = self.settings
        pieces = parts(on_device(batch.arrays, self.device), settings.accumulation)
        rows = memory.rows_of(pieces[0][0])
        self._check_memory(pieces[0][0])
        losses: list[torch.Tensor] = []
        with memory.explained(
            rows=rows, accumulation=settings.accumulation, batch_size=settings.batch_size, device=self.device
        ):
            for number, (part, share) in enumerate(pieces):
                self._seed(number)
                is_last = number == len(pieces) - 1
                with contextlib.nullcontext() if is_last else parallel.no_sync(step):
                    seen = self._prepared(part)
                    with self._autocast():
                        output: StepOutput = step(seen, self.progress)
                    self.scaler.scale(output.loss * (share * batch.weight)).backward()
                losses.append(output.loss.detach())
        values = torch.stack(losses).tolist()
        self.bad_part = next((n for n, value in enumerate(values) if not math.isfinite(value)), None)
        return sum(value * share for value, (_, share) in zip(values, pieces, strict=True)), output

    def _prepared(self, part: Tensors) -> Tensors:
        if self.hooks.prepare is not None:
            with torch.no_grad():
                part = self.hooks.prepare(part, self.progress.epoch)
        if not self.settings.channels_last:
            return part
        return {name: channels_last(value) for name, value in part.items()}

    def _check_memory(self, part: Tensors) -> None:
        """Once, on the CPU, where being out of memory is no error but the end of the process."""
        if self.is_checked or self.device.type != "cpu":
            return
        self.is_checked = True

        def loss(twin: nn.Module, few: Tensors) -> torch.Tensor:
            self._seed(0)
            with self._autocast():
                return cast(Task, twin).training_step(self._prepared(few), self.progress).loss

        memory.refuse_if_too_large(
            memory.estimate_bytes(self.module, loss, part),
            memory.free_bytes(self.device),
            rows=memory.rows_of(part),
            accumulation=self.settings.accumulation,
            batch_size=self.settings.batch_size,
        )

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.settings.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.settings.precision])

    def _seed(self, part: int) -> int:
        """Seeds torch's generator for one part of this step on this rank."""
        seed = mixed(self.settings.seed, self.progress.step, parallel.rank(), part)
        torch.manual_seed(seed)
        return seed

    def _apply(self) -> None:
        if self.settings.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = [one for group in self.optimizer.param_groups for one in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _checkpoint(self, *, is_due: bool) -> None:
        every, step = self.settings.checkpoint_every_steps, self.progress.step
        is_due = is_due or step == self.progress.num_steps or (every is not None and step % every == 0)
        is_due = is_due or (self.hooks.validation is not None and self.hooks.validation.wants_checkpoint(step))
        if is_due and self.hooks.on_checkpoint is not None:
            self.hooks.on_checkpoint(self.capture, self.progress)
            self.saved_s = time.monotonic()

    def _keep_bad_part(self, batch: Batch) -> Path | None:
        """Keeps what made this rank's loss not finite; None where it was another rank's."""
        if self.bad_part is None or self.hooks.folder is None:
            return None
        part, _ = parts(on_device(batch.arrays, self.device), self.settings.accumulation)[self.bad_part]
        seed = self._seed(self.bad_part)
        return divergence.keep_batch(
            self.hooks.folder, self.module, self._prepared(part), self.progress, seed=seed, rank=parallel.rank()
        )


def _nothing(*_: Any) -> None:
    """What a method does that a task or an iterator has not."""
