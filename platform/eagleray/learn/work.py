"""Work: everything that a training run is made of, ready for the loop, wherever a scheduler puts it.

A flow says how its Work is made from a config; the loop's shell (flows/train_worker.py) knows no more than this.

Example:
    >>> train(work.task, work.batches(rank=0, world_size=1), work.settings, hooks=Hooks(prepare=work.prepare))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from eagleray.learn.corpus_index import CorpusIndex, Ints
from eagleray.learn.feeding import Batches, FeedSettings
from eagleray.learn.task import Progress, StepOutput, Transform
from eagleray.learn.training import TrainSettings
from eagleray.learn.validation import METRIC, Validation


class Watch(Protocol):
    """What looks at a run while it goes on: probes, detectors. Every worker calls it at the same steps."""

    def prepare(self, part: Mapping[str, Any], epoch: int) -> Mapping[str, Any]:
        """The batch that the task sees, of the batch on the device."""

    def on_step(self, progress: Progress, output: StepOutput) -> None:
        """After every optimizer step."""

    def figures(self) -> dict[str, float]:
        """What was seen since the last time, by name."""

    def state_dict(self) -> dict[str, Any]:
        """For ``load_state_dict``, so that a resumed run goes on measuring."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what ``state_dict`` gave."""

    def to(self, device: Any) -> Any:
        """Moves it to the worker's device."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A run before its first step.

    Attributes:
        task: A ``task.Task``, an nn.Module.
        index: The images.
        transform: Items to arrays.
        feed: How the images become batches.
        settings: Of the loop.
        key: What the run is, as JSON values: a checkpoint of another is refused.
        sampler: Epoch to repeats of each image; None: each once.
        watch: Probes; None: nothing is looked at but the loss.
        validation: Held-out images; None: nothing is measured.
        notes: What a person should know, one line each.
    """

    task: nn.Module
    index: CorpusIndex
    transform: Transform
    feed: FeedSettings
    settings: TrainSettings
    key: Mapping[str, Any]
    sampler: Callable[[int], Ints] | None = None
    watch: Watch | None = None
    validation: Validation | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def keeps_best_by(self) -> str | None:
        """The metric of the checkpoint that the result comes from; None: it comes from the last."""
        return METRIC if self.validation is not None and self.validation.keeps_best else None

    def batches(self, *, rank: int, world_size: int) -> Batches:
        """The batches of one rank, made in its process.

        Raises:
            ConfigError: The batch does not divide among the workers.
            DataError: There are fewer images than a batch has.
        """
        return Batches(self.index, self.transform, self.feed, rank=rank, world_size=world_size, sampler=self.sampler)
