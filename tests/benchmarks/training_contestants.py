"""Who trains side by side: `eagleray pretrain` and `finetune` and their peers, each a process of its own.

Ours is the whole command with its reports, probes and checkpoints; its steady rate is read from metrics.jsonl, between
the first report after the warm steps and the last one before the end. A peer first tries its settings over a few steps,
prints what each gave, and keeps the best.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from checkout import EAGLERAY
from contestants import HERE, Cost, metered

SWEPT = (  # a peer's DataLoader has 2 workers, as issue 3 says; the best of these is used
    {"threads": 2, "layout": "last"},
    {"threads": 2, "layout": "first"},
    {"threads": 1, "layout": "last"},
)
SWEEP_STEPS, SWEEP_WARM = 12, 3
MOST_SEED = 10_000


@dataclass(frozen=True)
class Trial:
    """One run of one side.

    Attributes:
        images: Seen in the steady part.
        seconds_steady: Of that part.
        cost: Of the whole process.
        loss: At the end.
        wait_percent: Share of the steady part that ours waited for data; None for a peer.
        weights: Of the backbone, where they were kept.
    """

    images: int
    seconds_steady: float
    cost: Cost
    loss: float
    wait_percent: float | None = None
    weights: Path | None = None

    @property
    def rate(self) -> float:
        """Images a second, steady."""
        return self.images / self.seconds_steady if self.seconds_steady else 0.0

    def to_json(self) -> dict[str, Any]:
        """Every figure."""
        figures = {"images": self.images, "seconds_steady": self.seconds_steady, "images_per_s": self.rate}
        return {**figures, "loss": self.loss, "wait_percent": self.wait_percent, **vars(self.cost)}


@dataclass
class Ours:
    """A verb of the command line.

    Attributes:
        work: Where runs go; each begins anew.
        name: Shown, and in paths.
        words: The command after `eagleray`, without --out.
        settings: Given by --set.
        warm: Steps that are not counted.
    """

    work: Path
    name: str
    words: Sequence[str]
    settings: Mapping[str, Any]
    warm: int = 0
    used: dict[str, Any] = field(default_factory=dict)

    def tune(self) -> None:
        """Nothing: the defaults are what is measured."""

    def run(self, seed: int) -> Trial:
        """One fresh run."""
        out = self.work / f"{self.name.replace(' ', '-')}-{seed}"
        for path in (out, Path(f"{out}.run")):
            shutil.rmtree(path, ignore_errors=True)
        settings = {"report_every_s": 1.0, "has_report": False, **self.settings, "seed": seed}
        command = [*EAGLERAY, *self.words, "--out", str(out)]
        for name, value in settings.items():
            command += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        _, cost = metered(command, out.with_suffix(".log"))
        rows = [json.loads(line) for line in (Path(f"{out}.run") / "metrics.jsonl").read_text().splitlines()]
        return steady(rows, self.warm, cost, out / "model.safetensors")


def steady(rows: Sequence[Mapping[str, Any]], warm: int, cost: Cost, weights: Path) -> Trial:
    """The steady part of a run's reports.

    Raises:
        SystemExit: Too few reports for it: more steps are needed.
    """
    loss = float(rows[-1]["loss"])
    inside = [row for row in rows if warm <= row["step"] < row["num_steps"]]
    if not warm:  # whole commands are compared
        return Trial(0, 0.0, cost, loss, None, weights)
    if len(inside) < 2:
        raise SystemExit(f"{len(inside)} reports after step {warm} of {rows[-1]['num_steps']}: give more steps")
    first, last = inside[0], inside[-1]
    seconds = [after["at"] - before["at"] for before, after in pairwise(inside)]
    images = sum(s * row["images_per_s"] for s, row in zip(seconds, inside[1:], strict=True))
    wait = sum(s * row["data_wait_percent"] for s, row in zip(seconds, inside[1:], strict=True)) / sum(seconds)
    return Trial(round(images), last["at"] - first["at"], cost, loss, wait, weights)


@dataclass
class Peer:
    """A script of peers/.

    Attributes:
        work: Where logs and weights go.
        name: Shown.
        script: Its file.
        options: Its options.
        candidates: Settings to try; one alone is used as it is.
        keeps_weights: Whether it writes its backbone.
    """

    work: Path
    name: str
    script: str
    options: Mapping[str, Any]
    candidates: Sequence[Mapping[str, Any]] = SWEPT
    keeps_weights: bool = False
    used: dict[str, Any] = field(default_factory=dict)

    def _run(self, options: Mapping[str, Any], log: str) -> tuple[dict[str, Any], Cost]:
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        text, cost = metered([sys.executable, str(HERE / "peers" / self.script), *words], self.work / f"{log}.log")
        told: dict[str, Any] = json.loads(text.splitlines()[-1])
        return told, cost

    def tune(self) -> None:
        """Tries the settings over a few steps, prints each rate, keeps the best."""
        if len(self.candidates) < 2:
            self.used = dict(self.candidates[0]) if self.candidates else {}
            return
        rates = []
        for candidate in self.candidates:
            few = {**self.options, **candidate, "steps": SWEEP_STEPS, "warm": SWEEP_WARM, "epochs": 1}
            if "epochs" not in self.options:
                del few["epochs"]
            told, _ = self._run(few, f"{self.script}-sweep")
            rates.append(told["images"] / told["seconds_steady"])
            print(f"#   {self.name:<24} {rates[-1]:8.1f} img/s  {json.dumps(candidate)}", flush=True)
        self.used = dict(self.candidates[rates.index(max(rates))])

    def run(self, seed: int) -> Trial:
        """One fresh run at the best settings."""
        weights = self.work / f"{self.script}-{seed}.safetensors" if self.keeps_weights else None
        options = {**self.options, **self.used, "seed": seed, **({"out": weights} if weights else {})}
        told, cost = self._run(options, f"{self.script}-{seed}")
        return Trial(told["images"], told["seconds_steady"], cost, told["loss"], None, weights)
