"""Judges one bundle of a release: its accuracy, how it differs from the parent, what it takes, whether it may pass.

Example:
    >>> Bench(config, parent, home).judge(parent, home, row, parent=None).accuracy.text
    '0.934 (0.905 to 0.961)'
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eagleray.assure.comparison import Comparison, Contestant, compare
from eagleray.assure.release_table import Gate, StepRow
from eagleray.assure.release_table import judge as judge_loss
from eagleray.core.errors import ArtifactError, CapabilityError
from eagleray.flows import evaluate
from eagleray.flows.evaluate import EvaluateConfig, Subject
from eagleray.flows.measurement import Measurement, decode_seconds, measure, work_of
from eagleray.flows.release_images import sample
from eagleray.flows.release_plan import ReleaseConfig
from eagleray.infer.runtimes.measure import candidates
from eagleray.infer.runtimes.timing import TimingSettings
from eagleray.vision.bootstrap import Estimate, Resampling
from eagleray.vision.bundle import PROBES, ModelBundle
from eagleray.vision.metrics import Answers

if TYPE_CHECKING:
    from eagleray.assure.scored_answers import ScoredAnswers

EVALUATION = "evaluation"
NUM_DECODED = 32


@dataclass(frozen=True)
class Judged:
    """The answers of one bundle on the split that judges."""

    bundle: ModelBundle
    subject: Subject
    scored: ScoredAnswers
    accuracy: Estimate


@dataclass(frozen=True)
class Bench:
    """Where the bundles of a release are judged, one after the other; the parent first.

    Attributes:
        config: The release's.
        bundle: The parent.
        home: The parent's folder.
    """

    config: ReleaseConfig
    bundle: ModelBundle
    home: Path

    @cached_property
    def parent(self) -> Judged:
        """The parent's answers."""
        return self._evaluate(self.bundle, self.home, self.config.runtime)

    def judge(self, bundle: ModelBundle, home: Path, row: StepRow, *, parent: StepRow | None) -> StepRow:
        """Fills in a row.

        Args:
            bundle: To be judged: the parent itself, or what a step made.
            home: Its folder.
            row: What is known of it: its name, what it is.
            parent: The parent's row; None where it is the parent that is judged.
        """
        takes = self._measure(bundle, parent)
        own, theirs = takes["this"], takes["parent"]
        best = own.best if parent is None else own.of(self.config.target)
        mine = self.parent if parent is None else self._evaluate(bundle, home, self.config.runtime_for(bundle))
        found = None if parent is None else compared(self.config, self.parent, mine)
        work = work_of(best, self.decode_s)
        row = replace(
            row,
            accuracy=mine.accuracy,
            model_bytes=own.model_bytes,
            parameters=own.parameters,
            macs=own.macs,
            engine=best.engine,
            precision=bundle.precision,
            latency_ms_p50=best.latency_ms_p50,
            latency_ms_p95=best.latency_ms_p95,
            images_per_s=best.images_per_s,
            best_batch=best.best_batch,
            core_s_per_image=work.core_s_per_image,
            gpu_s_per_image=work.gpu_s_per_image,
            gpu=work.gpu,
        )
        if found is None:
            return row
        figure = found.differences[found.lead]
        row = replace(
            row,
            change=figure,
            agreement=found.agreement,
            recalls=dict(found.recalls),
            speedup=round(best.images_per_s / theirs.best.images_per_s, 4),
        )
        return row.with_gates(*judge_loss(found, self.config.limits), self._parity(bundle))

    def _evaluate(self, bundle: ModelBundle, home: Path, runtime: str) -> Judged:
        """The bundle's own evaluation, as anybody runs it, with its page."""
        subject = evaluate.resolve(self._asked(bundle, home, runtime))
        said = evaluate.run_on(subject, is_quiet=True)
        lead = "exact_match" if subject.is_multi_label else "top1"
        return Judged(bundle, subject, evaluate.read_scored(subject), Estimate(**said[lead]))

    def _asked(self, bundle: ModelBundle, home: Path, runtime: str) -> EvaluateConfig:
        config = self.config
        same = ("corpus", "split", "splits", "resamples", "level", "seed", "address", "workers", "num_cpus", "num_gpus")
        more = ("threads", "batch_size", "in_process_below")
        return EvaluateConfig(
            model=str(bundle.path),
            out=str(home / EVALUATION),
            allow_missing=True,
            runtime=runtime,
            **{name: getattr(config, name) for name in (*same, *more)},
        )

    def _measure(self, bundle: ModelBundle, parent: StepRow | None) -> dict[str, Measurement]:
        """What a bundle takes, in turns with the parent on the engine that was its best; of the parent, alone."""
        config = self.config
        settings = TimingSettings(
            threads=config.threads, device=config.device, rounds=config.rounds, turn_s=config.turn_s
        )
        if parent is None:
            alone = measure({"this": bundle}, settings, engines={"this": config.engines})["this"]
            return {"this": alone, "parent": alone}
        own = (config.target,) if config.target else config.engines
        engines = {"this": own, "parent": (parent.engine,)}
        return measure({"parent": self.bundle, "this": bundle}, settings, engines=engines)

    def _parity(self, bundle: ModelBundle) -> Gate:
        """Every engine that is here, or the target, answers the probe set."""
        from eagleray.infer.parity import check_parity

        config = self.config
        here = [name for name in candidates(bundle, config.device) if not config.engines or name in config.engines]
        engines = [config.target] if config.target else [name for name in here if name != "torch"]
        told, is_passed = [], bool(engines)
        for engine in engines:
            try:
                found = check_parity(bundle, engine, threads=1, device=config.device)
            except (ArtifactError, CapabilityError) as error:
                is_passed = False
                told.append(f"{engine}: {error.seen}")
                continue
            is_passed &= found.is_passed
            told.append(f"{engine}: |dp| {found.max_abs_dp:.2g}, same answer {found.top1_agreement:.0%}")
        own = "every engine answers the probe set"
        allowed = own if PROBES in bundle.files else "every engine answers generated probes: it has no set of its own"
        return Gate("parity", is_passed, "; ".join(told) or "no engine", allowed)

    @cached_property
    def decode_s(self) -> float:
        """Core-seconds of decoding one image of the split."""
        subject = self.parent.subject
        images = sample(self.config, subject.splits, subject.index, NUM_DECODED)
        return decode_seconds(images, subject.bundle.image_spec)


def compared(config: ReleaseConfig, parent: Judged, other: Judged) -> Comparison:
    """The parent first, the other second, on the images that both answered."""
    is_scored = parent.scored.is_scored & other.scored.is_scored
    sides = []
    for name, side in (("parent", parent), ("this", other)):
        targets = evaluate.targets_of(side.subject)[is_scored]
        answers = Answers(side.scored.probabilities[is_scored], targets, side.subject.config.threshold)
        sides.append(Contestant(name, side.bundle.label_ids, answers))
    groups = None
    subject = parent.subject
    if subject.splits.group_column:
        kept = subject.splits.groups[subject.keep][is_scored]
        groups = np.unique(kept, return_inverse=True)[1].astype(np.int64)
    way = Resampling(int(is_scored.sum()), config.resamples, config.seed, config.level, groups)
    return compare(sides[0], sides[1], way)
