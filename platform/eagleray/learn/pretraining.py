"""What looks at self-supervised learning while it goes on: colours of the views, probes on labels, collapse.

Example:
    >>> watch = PretrainingWatch(plan, width=512, num_classes=6)
    >>> train(method, batches, settings, hooks=Hooks(prepare=watch.prepare, on_step=watch.on_step))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from eagleray.learn.selfsup.collapse import CollapseConfig, CollapseDetector
from eagleray.learn.selfsup.photometric import Photometric
from eagleray.learn.selfsup.probes import KnnProbe, LinearProbe
from eagleray.learn.selfsup.views import ViewPlan
from eagleray.learn.task import Progress, StepOutput

MEASURES = ("spread", "effective_rank")  # of a CollapseReport; what a method logs itself is in the step's own logs


class PretrainingWatch(nn.Module):  # type: ignore[misc]
    """A ``work.Watch`` of self-supervised runs.

    Args:
        plan: The views.
        width: D of the backbone's features.
        num_classes: Of the labels that probes learn from; 0: there are none, and no probes.
        collapse: When a representation counts as collapsed.
        num_outputs: K of a teacher's distribution; None when the method has none.
    """

    def __init__(
        self,
        plan: ViewPlan,
        *,
        width: int,
        num_classes: int = 0,
        collapse: CollapseConfig | None = None,
        num_outputs: int | None = None,
    ) -> None:
        super().__init__()
        self.photometric = Photometric(plan)
        self.detector = CollapseDetector(collapse, num_outputs=num_outputs)
        self.knn = KnnProbe(width, num_classes=num_classes) if num_classes > 1 else None
        self.linear = LinearProbe(width, num_classes=num_classes) if num_classes > 1 else None
        self._target = self._key = torch.empty(0)
        self._right: dict[str, list[int]] = {}
        self._measured: dict[str, float] = {}

    def prepare(self, part: Mapping[str, Any], epoch: int) -> Mapping[str, Any]:
        """The views of a part of a batch; keeps its labels for the probes."""
        self._target, self._key = part["target"], part["key"]
        return {"views": self.photometric(part, epoch), "key": part["key"]}

    def on_step(self, progress: Progress, output: StepOutput) -> None:
        """Measures collapse and asks the probes.

        Raises:
            TrainingDiverged: The representation collapsed, and that is to end the run.
        """
        found = self.detector.observe(output, step=progress.step)
        if found is not None:
            self._measured = {name: value for name, value in asdict(found).items() if name in MEASURES}
        if output.embedding is None or self.knn is None or self.linear is None:
            return
        self._count("knn_top1", self.knn.observe(output.embedding, self._target, self._key))
        self._count("linear_top1", self.linear.observe(output.embedding, self._target))

    def figures(self) -> dict[str, float]:
        """Shares of labelled images that the probes told right since the last time, and the last measures."""
        shares = {name: right / max(1, total) for name, (right, total) in self._right.items()}
        self._right = {}
        return {**self._measured, **shares}

    def _count(self, name: str, is_right: torch.Tensor | None) -> None:
        if is_right is not None and len(is_right):
            counts = self._right.setdefault(name, [0, 0])
            counts[0] += int(is_right.sum())
            counts[1] += len(is_right)
