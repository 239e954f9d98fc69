"""One worker of a training run, wherever it runs: it makes its Work, goes on from the newest good checkpoint, trains.

Rank 0 writes the checkpoints, metrics.jsonl and TensorBoard's events; the others read. What the run is comes as JSON,
so that the same function serves this process, a Ray actor and a test.

Example:
    >>> run_worker(spec, Seat(), is_stopped=lambda: False)
    {'is_finished': True, 'step': 400, 'world_size': 1, 'seconds': 62.1}
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from eagleray.core.errors import ClusterError, StorageError
from eagleray.flows.run_folder import RunFolder, append_line, read_lines
from eagleray.flows.training_config import TrainingConfig, held_cores

if TYPE_CHECKING:
    from eagleray.learn.checkpoints import Checkpoint
    from eagleray.learn.feeding import BatchSource
    from eagleray.learn.reports import StepReport
    from eagleray.learn.task import Progress
    from eagleray.learn.work import Work

MakeBatches: TypeAlias = "Callable[[Work, Seat], BatchSource]"

MOST_IDLE_STARTS = 6  # in a row from one step: a worker that cannot take a single step is not mended by another start
SAVE_WAITS_S = (1.0, 4.0, 16.0)  # between tries to write a checkpoint: a network file system that hiccups
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seat:
    """A worker's place among the others."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Spec:
    """What a run is, for its workers: JSON values only.

    Attributes:
        flow: Module of the flow: its ``CONFIG`` is the config's class, its ``make_work`` makes the Work.
        values: The config, paths absolute.
        attempt: The number of this entry into the run.
        since: When the command began, seconds since 1970: only starts after it count as idle ones.
    """

    flow: str
    values: Mapping[str, Any]
    attempt: int
    since: float = 0.0

    @property
    def config(self) -> TrainingConfig:
        """The config."""
        config: TrainingConfig = importlib.import_module(self.flow).CONFIG.model_validate(self.values)
        return config

    def make_work(self) -> Work:
        """The Work."""
        work: Work = importlib.import_module(self.flow).make_work(self.config)
        return work


def run_worker(
    spec: Spec,
    seat: Seat,
    *,
    is_stopped: Callable[[], bool],
    tell: Callable[[Mapping[str, Any]], None] | None = None,
    make_batches: MakeBatches | None = None,
) -> dict[str, Any]:
    """Trains until the end of the run or until it is told to stop.

    Args:
        spec: The run.
        seat: Of this worker.
        is_stopped: Asked after every step; the run then checkpoints and returns.
        tell: Rank 0 gives it every report, as metrics.jsonl has it.
        make_batches: Where batches come from; None: threads of this process.

    Returns:
        How it ended: ``is_finished``, ``step``, ``world_size``, ``seconds``.

    Raises:
        EagleError: What learn.training.train and load_latest raise.
        ClusterError: Workers begin again and again without taking a step.
    """
    import torch

    from eagleray.learn.training import train

    config = spec.config
    torch.set_num_threads(config.threads or held_cores(config))
    started = time.monotonic()
    work = spec.make_work()
    shell = _Shell(spec, seat, work, is_stopped, tell)
    with shell.opened() as start:
        source = (make_batches or _in_worker)(work, seat)
        result = train(work.task, source, work.settings, hooks=shell.hooks(), device=seat.device, start=start)
    return {
        "is_finished": result.is_finished,
        "step": result.progress.step,
        "num_steps": result.progress.num_steps,
        "world_size": seat.world_size,
        "seconds": round(time.monotonic() - started, 3),
        "device": seat.device,
    }


def _in_worker(work: Work, seat: Seat) -> BatchSource:
    return work.batches(rank=seat.rank, world_size=seat.world_size)


class _Shell:
    """What is between the loop and the run's folder."""

    def __init__(
        self,
        spec: Spec,
        seat: Seat,
        work: Work,
        is_stopped: Callable[[], bool],
        tell: Callable[[Mapping[str, Any]], None] | None,
    ) -> None:
        self.spec, self.seat, self.work, self.tell = spec, seat, work, tell
        self.folder, self.config = RunFolder(Path(spec.values["run_dir"])), spec.config
        self._asked = is_stopped
        self._events: Any = None
        self._pauses = _Pauses(0.5)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Checkpoint | None]:
        """Finds where to go on; closes the events at the end."""
        start = self._find_start()
        step = start.progress.step if start else 0
        if start and self.work.watch is not None and "watch" in start.state:
            self.work.watch.load_state_dict(start.state["watch"])
        if self.work.watch is not None:
            self.work.watch.to(self.seat.device)
        if self.seat.rank == 0:
            self._note_start(step)
            self.folder.cut_metrics(step)
            self._events = _open_events(self.folder.events, step)
        try:
            yield start
        finally:
            if self._events is not None:
                self._events.close()

    def _find_start(self) -> Checkpoint | None:
        """The newest good checkpoint as rank 0 sees it; the others read the very same."""
        from eagleray.learn import checkpoints

        home, key = self.folder.checkpoints, self.work.key
        if self.seat.rank == 0 or self.seat.world_size == 1:
            found = checkpoints.load_latest(home, config=key)
            _agree(found.checkpoint.progress.step if found else -1, self.seat)
            return found.checkpoint if found else None
        step = _agree(0, self.seat)
        return checkpoints.load(home / f"step-{step:08d}", config=key) if step >= 0 else None

    def _note_start(self, step: int) -> None:
        before = [start for start in read_lines(self.folder.starts) if start["at"] >= self.spec.since]
        idle = 0
        while idle < len(before) and before[-1 - idle]["step"] == step:
            idle += 1
        if idle >= MOST_IDLE_STARTS:
            raise ClusterError(
                f"workers have begun {idle} times at step {step} and never reached a checkpoint",
                expected="workers that live at least until the first checkpoint",
                fix="look at the workers' memory and logs; give checkpoint_every_steps, a smaller batch_size or "
                "accumulation; then run the same command again with --resume never, or another --out",
            )
        append_line(
            self.folder.starts,
            {
                "attempt": self.spec.attempt,
                "step": step,
                "world_size": self.seat.world_size,
                "device": self.seat.device,
                "node": os.uname().nodename,
                "at": round(time.time(), 3),
            },
        )

    def hooks(self) -> Any:
        """The loop's hooks."""
        from eagleray.learn.training import Hooks

        watch = self.work.watch
        return Hooks(
            prepare=watch.prepare if watch else None,
            on_step=watch.on_step if watch else None,
            on_report=self._report,
            on_checkpoint=self._save,
            should_stop=self._should_stop,
            validation=self.work.validation,
            folder=self.folder.root,
            config=self.work.key,
        )

    def _should_stop(self) -> bool:
        if self._asked():
            return True
        if not self._pauses.is_over():
            return False
        return self.folder.is_asked_to_stop(self.spec.attempt)

    def _report(self, report: StepReport) -> None:
        looking = (self.work.watch, self.work.validation)
        figures = {name: value for one in looking if one is not None for name, value in one.figures().items()}
        if self.seat.rank != 0:
            return
        row = {
            **report.to_json(),
            "figures": figures,
            "line": report.line() + "".join(f"  {name} {value:.3g}" for name, value in figures.items()),
            "world_size": self.seat.world_size,
            "attempt": self.spec.attempt,
            "at": round(time.time(), 3),
        }
        append_line(self.folder.metrics, _finite(row))
        for name, value in _scalars(row):
            self._events.add_scalar(name, value, report.step)
        if self.tell is not None:
            self.tell(row)

    def _save(self, capture: Callable[[], Checkpoint], progress: Progress) -> None:
        """Publishes a checkpoint on rank 0, with more tries than one; not when a later attempt has begun."""
        from eagleray.learn import checkpoints

        if self.seat.rank != 0 or self.folder.attempt() != self.spec.attempt:
            return
        checkpoint = capture()
        if self.work.watch is not None:
            checkpoint = replace(checkpoint, state={**checkpoint.state, "watch": dict(self.work.watch.state_dict())})
        for wait_s in (*SAVE_WAITS_S, None):
            try:
                checkpoints.save(
                    self.folder.checkpoints,
                    checkpoint,
                    keep=self.config.keep_checkpoints,
                    best=self.work.keeps_best_by,
                )
            except StorageError as error:
                if wait_s is None or "No space" in error.seen:
                    raise
                log.warning("%s; tried again in %g s", error.seen, wait_s)
                time.sleep(wait_s)
            else:
                self._events.flush()
                return


class _Pauses:
    """Says at most every few seconds that it is time to look."""

    def __init__(self, every_s: float) -> None:
        self._every_s, self._last_s = every_s, 0.0

    def is_over(self) -> bool:
        now = time.monotonic()
        if now - self._last_s < self._every_s:
            return False
        self._last_s = now
        return True


def _agree(step: int, seat: Seat) -> int:
    """Rank 0's number, on every rank."""
    if seat.world_size == 1:
        return step
    import torch

    value = torch.tensor([step], dtype=torch.int64, device=seat.device)
    torch.distributed.broadcast(value, src=0)
    return int(value.item())


def _open_events(folder: Path, step: int) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name in ("loss", "lr", "images_per_s", "data_wait_percent", "peak_memory_gib"):
        yield f"train/{name}", row[name]
    for group in ("logs", "figures"):
        for name, value in row[group].items():
            yield f"{group}/{name}", value


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """NaN and infinity as null, which is JSON."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(item) for key, item in value.items()}
        return None if isinstance(value, float) and not -float("inf") < value < float("inf") else value

    return {key: clean(value) for key, value in row.items()}
