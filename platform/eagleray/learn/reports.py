"""What a training run says of itself every few seconds: step, loss, images/s, data wait, learning rate, ETA, memory.

Example:
    >>> report.line()
    'step 120/400  epoch 3  loss 1.284  512 img/s  data wait 2 %  lr 0.00081  ETA 42 s  peak 1.9 GiB'
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from eagleray.core.progress import duration
from eagleray.learn.memory import peak_gib
from eagleray.learn.task import Progress


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """A stretch of a run.

    Attributes:
        step: Optimizer steps done.
        num_steps: Of the whole run.
        epoch: From 0.
        loss: Mean over the stretch's images.
        images_per_s: Over the stretch, all workers together.
        data_wait_percent: Share of the stretch that the step waited for data.
        lr: Learning rate of the last step.
        eta_s: Until the last step, at this pace.
        peak_memory_gib: The most so far: of the device on CUDA, else of this process.
        logs: What the task logged in the last step, as numbers.
    """

    step: int
    num_steps: int
    epoch: int
    loss: float
    images_per_s: float
    data_wait_percent: float
    lr: float
    eta_s: float
    peak_memory_gib: float
    logs: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "logs": dict(self.logs)}

    def line(self) -> str:
        """The report as a person reads it."""
        rate = f"{self.images_per_s:,.0f}" if self.images_per_s >= 10 else f"{self.images_per_s:.1f}"
        parts = [
            f"step {self.step:,}/{self.num_steps:,}",
            f"epoch {self.epoch}",
            f"loss {self.loss:.4g}",
            f"{rate} img/s",
            f"data wait {self.data_wait_percent:.0f} %",
            f"lr {self.lr:.3g}",
        ]
        if self.step < self.num_steps:
            parts.append(f"ETA {duration(self.eta_s)}")
        return "  ".join([*parts, f"peak {self.peak_memory_gib:.1f} GiB"])


class Meter:
    """Counts between reports.

    Args:
        every_s: Seconds between reports.
        device: Whose memory is told.
    """

    def __init__(self, every_s: float, device: torch.device) -> None:
        self._every_s, self._device = every_s, device
        self._start_s = time.monotonic()
        self._wait_s = self._loss = self._lr = 0.0
        self._images = self._steps = 0
        self._logs: Mapping[str, Any] = {}
        self._last: StepReport | None = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time within as waiting for data."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._wait_s += time.monotonic() - start

    def add(self, images: int, loss: float, lr: float, logs: Mapping[str, Any]) -> None:
        """Counts a step."""
        self._images += images
        self._steps += 1
        self._loss += loss * images
        self._lr, self._logs = lr, logs

    @property
    def has_steps(self) -> bool:
        """Whether a step was counted since the last report."""
        return self._steps > 0

    def is_due(self) -> bool:
        """Whether it is time for a report."""
        return time.monotonic() - self._start_s >= self._every_s

    def report(self, progress: Progress) -> StepReport:
        """The stretch since the last report, which ends here; the last report again when nothing was done since."""
        if not self.has_steps and self._last is not None:
            return self._last
        now = time.monotonic()
        passed = max(now - self._start_s, 1e-9)
        left = progress.num_steps - progress.step
        self._last = StepReport(
            step=progress.step,
            num_steps=progress.num_steps,
            epoch=progress.epoch,
            loss=self._loss / self._images if self._images else float("nan"),
            images_per_s=self._images / passed,
            data_wait_percent=100 * min(1.0, self._wait_s / passed),
            lr=self._lr,
            eta_s=left * passed / max(1, self._steps),
            peak_memory_gib=peak_gib(self._device),
            logs={name: float(value) for name, value in self._logs.items()},
        )
        self._start_s, self._wait_s, self._loss, self._images, self._steps = now, 0.0, 0.0, 0, 0
        return self._last
