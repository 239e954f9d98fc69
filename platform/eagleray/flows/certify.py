"""Certify a model: find thresholds whose KPI is proved on held-out images, and publish a bundle that decides by them.

The calibration images go through the same scoring path as an evaluation. The new bundle holds the model as it is and a
ThresholdPolicy with its evidence; Classifier alone applies it, so bulk, online and federated decisions are one. The run
is kept beside the bundle, in BUNDLE.run. The same command again does nothing new.

Refuses: a KPI that does not parse or names no label of the model, images that the model was trained on, a leak between
    splits, too few images for the claim, an output that holds something else. What cannot be proved is not published.

Example:
    >>> run(CertifyConfig(corpus="corpora/tiles", model="bundles/tiles", out="bundles/tiles-95",
    ...     kpi="precision(crack)>=0.95@0.95; maximize recall(crack)"))["claims"][0]["bound"]
    0.953
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from eagleray.assure import binomial
from eagleray.assure.calibration import fit_temperature
from eagleray.assure.certificate import Certificate, shortfall
from eagleray.assure.decision_metrics import METRICS, Sample
from eagleray.assure.kpi import parse
from eagleray.assure.thresholds import Task, certify
from eagleray.assure.utility import CostRule, cost_matrix
from eagleray.core import storage
from eagleray.core.errors import ConfigError, DataError, KpiNotMet
from eagleray.core.progress import notes
from eagleray.flows import evaluate
from eagleray.flows.certify_pieces import Pieces, divide, split_name
from eagleray.flows.evaluate import MOST_LABELS, SCORING, EvaluateConfig, Subject
from eagleray.flows.scoring_place import ScoringPlace, scoring_place
from eagleray.vision.splits import SplitRule

SHOWN = 5
OURS = (SCORING, "certificate.json", "record.json")


class CertifyConfig(ScoringPlace):
    """What to certify, by which images, to where; the rest says how.

    Attributes:
        corpus: A corpus with labels.
        model: A bundle's folder.
        kpi: Constraints and an objective; assure.kpi has the grammar.
        out: The bundle to write; the run's folder is OUT.run.
        split: A split's name; ``auto``: ``calibration`` where the corpus has it, else ``test``.
        splits: How the corpus is split where it has no ``split`` column, and what must not straddle.
        piece: Share of the split that is used; the rest stays unseen, for another judge.
        selection: Share of it that chooses thresholds; the others certify them.
        seed: Of that division.
        others: Labels that the KPI does not name: ``abstain`` never decides them, ``decide`` does where they are the
            most probable, without a claim.
        otherwise: The decision where no label is decided.
        has_temperature: Fit a temperature first; thresholds are then compared with calibrated probabilities.
        costs: What mistakes cost, for a KPI that speaks of cost.
        task: ``auto``: several labels an image when the bundle or the corpus has them.
        allow_unknown: Leave out images with a label that the model does not know.
        runtime, address, workers, num_cpus, num_gpus, threads, decode_threads, batch_size, in_process_below: As in
            ``score``.
        has_report: Write report.html.
    """

    corpus: str
    model: str
    kpi: str = Field(min_length=1)
    out: str
    split: str = Field("auto", min_length=1)
    splits: SplitRule = Field(default_factory=SplitRule)
    piece: float = Field(1.0, gt=0, le=1)
    selection: float = Field(0.25, gt=0, lt=1)
    seed: int = Field(0, ge=0)
    others: Literal["abstain", "decide"] = "abstain"
    otherwise: str = Field("abstain", min_length=1)
    has_temperature: bool = False
    costs: CostRule = Field(default_factory=CostRule)
    task: Literal["auto", "single_label", "multi_label"] = "auto"
    allow_unknown: bool = False
    has_report: bool = True

    @field_validator("out")
    @classmethod
    def _is_folder(cls, value: str) -> str:
        if "://" in value:
            raise ValueError("a bundle is written to a folder, not to a URI")
        return value

    @property
    def run_folder(self) -> Path:
        """Where the scores, the certificate and the page are."""
        out = Path(self.out)
        return out.with_name(out.name + ".run")


@dataclass(frozen=True)
class Plan:
    """What is certified, resolved and checked.

    Attributes:
        config: As asked.
        subject: Corpus, bundle, and the images of both pieces.
        pieces: Which of them choose.
        task: The KPI and how it is to be met, but for the images.
    """

    config: CertifyConfig
    subject: Subject
    pieces: Pieces
    task: Task

    @property
    def root(self) -> Path:
        """The run's folder."""
        return self.config.run_folder


def run(config: CertifyConfig, *, is_quiet: bool = False, is_live: bool | None = None) -> dict[str, Any]:
    """Certifies, or resumes, or finds that there is nothing to do.

    Args:
        config: The certification.
        is_quiet: No progress and no notes on stderr.
        is_live: A live line (True), log lines (False), or by whether stderr is a terminal.

    Returns:
        The certificate, as certificate.json has it, with ``bundle``, ``run`` and ``report``, the page's path.

    Raises:
        ConfigError: The KPI does not parse, ``out`` holds something else, or a wrong setting.
        DataError: The corpus has no labels, lacks the split, leaks, or has too few images for the claim; the model was
            trained on them.
        KpiNotMet: These images do not prove it; nothing is published.
        ArtifactError: The bundle or the corpus does not hold.
        CapabilityError, StorageError, ClusterError, RunIncomplete: As in ``score``.
    """
    from eagleray.flows import certify_outputs

    note = notes(is_quiet=is_quiet)
    plan = resolve(config)
    _refuse_foreign(plan.root)
    key = certify_outputs.key(plan)
    certify_outputs.refuse_occupied(plan, key)
    root = storage.make_folder(plan.root)
    with storage.only_writer(root / ".lock", what=str(root)):
        previous = certify_outputs.read_finished(plan, key)
        if previous is not None:
            note(f"nothing to do: {config.out} is certified for {previous['kpi']}")
            return previous
        for sentence in (*plan.subject.warnings, *_notes(plan)):
            note(sentence)
        evaluate.score_images(plan.subject, is_quiet=is_quiet, is_live=is_live)
        made = _certify(plan)
        document = certify_outputs.write_certificate(plan, key, made)
        if not made.is_met:
            raise _not_met(plan, made)
        return certify_outputs.publish(plan, document)


def resolve(config: CertifyConfig) -> Plan:
    """Opens and checks everything that is needed before an image is scored.

    Raises:
        ConfigError, DataError, ArtifactError: As ``run`` says.
    """
    same = ("corpus", "model", "splits", "task", "allow_unknown", "seed")
    asked = EvaluateConfig(
        out=str(config.run_folder),
        split=split_name(config.corpus, config.split, config.splits),
        allow_missing=True,
        **{name: getattr(config, name) for name in same},
        **scoring_place(config),
    )
    subject = evaluate.resolve(asked, can_allow=False)
    bundle = subject.bundle
    kpi = parse(config.kpi, bundle.labels)
    if config.otherwise in bundle.label_ids:
        raise ConfigError(
            f"otherwise={config.otherwise!r} is a label of the model",
            expected="a word that no label has: what is not decided is told from what is",
            fix="set others=decide to have the labels decided that the KPI does not name",
        )
    if len(bundle.labels) > MOST_LABELS:
        raise ConfigError(
            f"{config.model} has {len(bundle.labels):,} labels, and scoring keeps {MOST_LABELS:,} of an image",
            expected=f"a model of at most {MOST_LABELS:,} labels",
            fix="fine-tune a head on the labels that are decided",
        )
    pieces = divide(subject, piece=config.piece, selection=config.selection, seed=config.seed)
    subject = replace(subject, keep=pieces.keep)
    present = _present(subject)
    costs = cost_matrix(config.costs, bundle.label_ids)
    task = Task(
        kpi.over(present),
        bundle.label_ids,
        others=config.others,
        present=present,
        otherwise=config.otherwise,
        scaling="sigmoid" if bundle.output == "multi_label_logits" else "softmax",
        costs=costs if kpi.is_of_cost or config.costs != CostRule() else None,
    )
    plan = Plan(config, subject, pieces, task)
    _refuse_too_few(plan)
    return plan


def _present(subject: Subject) -> tuple[str, ...]:
    """Labels that the images have, in the model's order."""
    labels = subject.index.labels
    have = {labels.names[at] for at in np.flatnonzero(labels.counts(subject.keep))}
    return tuple(name for name in subject.bundle.label_ids if name in have)


def _truth(plan: Plan) -> np.ndarray:
    """bool (n, C): the labels of each kept image."""
    targets = evaluate.targets_of(plan.subject)
    if plan.subject.is_multi_label:
        return targets
    truth = np.zeros((len(targets), len(plan.task.label_ids)), bool)
    truth[np.arange(len(targets)), targets] = True
    return truth


def _refuse_too_few(plan: Plan) -> None:
    """A claim that no outcome of scoring could prove is refused before an image is scored.

    To show a rate of at least r at confidence c takes log(1 - c) / log(r) images that all succeed. Of precision and
    recall each such image has the label.
    """
    truth, certifies = _truth(plan), ~plan.pieces.is_selection
    unit, faults, most = plan.pieces.unit, [], 0
    if not len(truth) or certifies.all() or not certifies.any():
        raise DataError(
            f"{len(truth):,} images of the split {plan.subject.config.split!r} cannot be divided in two",
            expected="images that choose thresholds and others that certify them",
            fix="label more images, or set another seed or selection",
        )
    for constraint in plan.task.kpi.constraints:
        metric = METRICS[constraint.metric]
        if metric.count is None:
            continue
        needed = binomial.fewest(
            constraint.target if metric.op == ">=" else 1 - constraint.target, constraint.confidence
        )
        there, what = int(certifies.sum()), f"{unit}s"
        if constraint.label is not None:
            column = truth[certifies, plan.task.label_ids.index(constraint.label)]
            is_of_rest = constraint.metric in ("specificity", "npv")
            there = int((~column if is_of_rest else column).sum())
            what = f"{unit}s {'that are not' if is_of_rest else 'of'} {constraint.label}"
        if there < needed:
            most = max(most, int(np.ceil(needed / (1 - plan.config.selection))))
            faults.append(f"{constraint.text} takes at least {needed:,} {what}, all decided rightly; {there:,} certify")
    if faults:
        more = f"; and {len(faults) - SHOWN:,} more" if len(faults) > SHOWN else ""
        raise DataError(
            f"too few images: {'; '.join(faults[:SHOWN])}{more}",
            expected=f"about {most:,} such {unit}s in the split {plan.subject.config.split!r}: a share of "
            f"{plan.config.selection:g} chooses thresholds and does not certify",
            fix="label more, hold out more of the corpus, or ask for a lower value or confidence",
        )


def _notes(plan: Plan) -> list[str]:
    choose = int(plan.pieces.is_selection.sum())
    certify = len(plan.pieces.is_selection) - choose
    stands = ", one image of each group" if plan.pieces.unit == "group" else ""
    split = plan.subject.config.split
    return [f"split {split!r}: {choose:,} images choose thresholds, {certify:,} others certify them{stands}"]


def _certify(plan: Plan) -> Certificate:
    """Reads what was scored, fits what may be fitted, and proves."""
    scored = evaluate.read_scored(plan.subject)
    known = scored.is_scored
    whole = Sample(scored.probabilities[known], _truth(plan)[known])
    is_selection = plan.pieces.is_selection[known]
    first, second = whole.part(is_selection), whole.part(~is_selection)
    if not len(first) or not len(second):
        raise DataError(
            f"{int((~known).sum()):,} of {len(known):,} images could not be scored, and what is left cannot be divided",
            expected="images that decode",
            fix=f"look at {plan.root / SCORING / 'quarantine.parquet'}",
        )
    temperature = fit_temperature(first, plan.task.scaling) if plan.config.has_temperature else 1.0
    found = certify(plan.task, selection=first, certification=second, temperature=temperature)
    about = {"unread": int((~known).sum()), "set_aside": plan.pieces.num_set_aside, "unit": plan.pieces.unit}
    return Certificate(plan.task, found, first, second, plan.subject.is_multi_label, about)


def _not_met(plan: Plan, made: Certificate) -> KpiNotMet:
    """Says what was seen, what would do, and what these images do prove."""
    here, whole = len(made.certification), len(made.certification) + len(made.selection)
    failed = [claim for claim in made.claims if not claim.is_met]
    told = [shortfall(claim, num_images=here) for claim in failed]
    numbers = [needed for _, needed in told if needed is not None]
    more = f"; and {len(failed) - SHOWN:,} more" if len(failed) > SHOWN else ""
    if len(numbers) == len(failed):
        needed = int(np.ceil(max(numbers) * whole / here))
        expected = f"would need about {needed:,} labelled {plan.pieces.unit}s like these; there are {whole:,}"
    else:
        expected = "a model that errs less on such images, or a KPI that asks for less"
    shown = [f"{claim.kpi.partition('@')[0]}: bound {claim.bound:.3f}" for claim in failed[:SHOWN] if claim.bound]
    page = f"; see {plan.root / 'report.html'}" if plan.config.has_report else ""
    proved = f"; these images show no more than {', '.join(shown)}" if shown else ""
    return KpiNotMet(
        f"not attainable with n={here:,}: {'; '.join(sentence for sentence, _ in told[:SHOWN])}{more}",
        expected=expected + proved,
        fix=f"label more, train a better model, or ask for less; nothing was published{page}",
    )


def _refuse_foreign(root: Path) -> None:
    """A folder that holds something else is not written into."""
    if not root.is_dir():
        return
    found = sorted(path.name for path in root.iterdir() if path.name != ".lock")
    if found and not set(found) & set(OURS):
        raise ConfigError(
            f"{root} is not empty and holds no `eagleray certify`: {', '.join(found[:SHOWN])}",
            expected="a new or empty folder, or the folder of the run to resume",
            fix="give another --out",
        )
