"""What an evaluation leaves: metrics.json, report.json, report.html, record.json; and whether it has left it already.

Example:
    >>> read_finished(subject, key(subject))["top1"]["value"]
    0.896
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eagleray import __version__
from eagleray.assure.comparison_report import comparison_blocks
from eagleray.assure.evaluation import SCHEMA
from eagleray.assure.evaluation_report import About, evaluation_report
from eagleray.assure.phrases import count, last_name, share
from eagleray.assure.report import Block
from eagleray.assure.scored_answers import ScoredAnswers
from eagleray.assure.slices_report import slices_blocks
from eagleray.core import commits, storage
from eagleray.core.config import digest as config_digest
from eagleray.core.config import digest_json
from eagleray.core.errors import ArtifactError, EagleError
from eagleray.core.records import Record, read_record
from eagleray.flows import evaluate_costs
from eagleray.flows.evaluate_subject import COMPARED, SCORING
from eagleray.flows.score_outputs import read_run, versions

if TYPE_CHECKING:
    from eagleray.assure.cost import Cost
    from eagleray.flows.evaluate import Judged
    from eagleray.flows.evaluate_subject import Subject

METRICS, REPORT, RECORD, PAGE = "metrics.json", "report.json", "record.json", "report.html"
ELSEWHERE = (  # change no figure: where it runs, how it is shown
    *("corpus", "model", "out", "address", "workers", "num_cpus", "num_gpus", "threads", "decode_threads"),
    *("batch_size", "in_process_below", "has_report", "runtime"),
)
ADDED = ("by", "min_slice", "compare")  # keyed only where they are asked for: an older evaluation keeps its key


def key(subject: Subject) -> str:
    """Digest of all that the figures depend on; the scoring run must be finished."""
    config = subject.config
    run = read_run(subject.root / SCORING) or {}
    parts: dict[str, Any] = {
        "schema": SCHEMA,
        "scores": [run.get("ledger_key"), run.get("input_digest")],
        "corpus": subject.corpus.digest,
        "split": [config.split, subject.splits.digest],
        "config": config_digest(config, exclude=(*ELSEWHERE, *ADDED)),
    }
    if config.by:
        parts["by"] = [list(config.by), config.min_slice]
    if subject.other is not None:
        compared = read_run(subject.root / COMPARED) or {}
        parts["compared"] = [compared.get("ledger_key"), compared.get("input_digest")]
    return digest_json(parts)


def read_finished(subject: Subject, wanted: str) -> dict[str, Any] | None:
    """The metrics document that is there, when it is of this key and every file holds; None otherwise.

    Raises:
        ArtifactError: A file of a newer schema.
    """
    root = subject.root
    try:
        found: dict[str, Any] = storage.read_json(root / METRICS)
        record = read_record(root / RECORD)
    except (FileNotFoundError, ValueError, EagleError):
        return None
    if found.get("schema", 0) > SCHEMA:
        raise ArtifactError(
            f"{root / METRICS} has schema {found['schema']}", expected=f"{SCHEMA} or older", fix="use a newer eagleray"
        )
    has_page = PAGE in record.subjects or not subject.config.has_report
    holds = all(
        (root / name).is_file() and storage.sha256_file(root / name) == digest
        for name, digest in record.subjects.items()
    )
    return found if holds and has_page and found.get("key") == wanted else None


def finish(subject: Subject, key: str, judged: Judged) -> dict[str, Any]:
    """Writes everything; the record last, so that what is unfinished is done again.

    Returns:
        The summary.
    """
    root, ended, found = subject.root, datetime.now(UTC).isoformat(timespec="seconds"), judged.evaluation
    (root / RECORD).unlink(missing_ok=True)
    costs = evaluate_costs.costs(subject)
    document = _document(subject, key, judged, costs)
    storage.write_json(root / METRICS, document)
    report = evaluation_report(found, _about(subject, judged, costs, ended))
    storage.write_json(root / REPORT, report.to_json())
    written = [METRICS, REPORT]
    if subject.config.has_report:
        from eagleray.flows.report import write_with_pictures

        write_with_pictures(root, report, root / SCORING / "input")
        written.append(PAGE)
    inputs = {"corpus": subject.corpus.digest, "model": subject.bundle.model_digest, "split": subject.splits.digest}
    inputs["scores"] = storage.sha256_file(root / SCORING / commits.MANIFEST)
    if subject.other is not None:
        inputs["compared model"] = subject.other.model_digest
        inputs["compared scores"] = storage.sha256_file(root / COMPARED / commits.MANIFEST)
    predicate = {
        "config_digest": config_digest(subject.config),
        "key": key,
        "split": subject.config.split,
        "images": found.num_images,
        "versions": versions(),
        "eagleray": __version__,
        "ended_at": ended,
    }
    subjects = {name: storage.sha256_file(root / name) for name in written}
    record = Record(kind="evaluate", subjects=subjects, inputs=inputs, predicate=predicate)
    storage.write_json(root / RECORD, record.to_json())
    return summary(root, document)


def summary(root: Path, document: dict[str, Any]) -> dict[str, Any]:
    """What a verb prints: the document, where it lies, its page."""
    page = root / PAGE
    return {**document, "out": str(root), "report": str(page) if page.exists() else ""}


def _left_out(subject: Subject, scored: ScoredAnswers) -> dict[str, int]:
    return {**subject.left_out, "that could not be read": int((~scored.is_scored).sum())}


def _document(subject: Subject, key: str, judged: Judged, costs: Mapping[str, Sequence[Cost]]) -> dict[str, Any]:
    run, bundle, scored = read_run(subject.root / SCORING) or {}, subject.bundle, judged.scored
    return {
        **judged.evaluation.to_json(),
        "split": {"name": subject.config.split, **subject.splits.to_json()},
        "left_out": _left_out(subject, scored),
        "warnings": list(subject.warnings),
        "corpus": {"path": str(subject.corpus.path), "digest": subject.corpus.digest},
        "model": {"path": str(bundle.path), "digest": bundle.model_digest, "architecture": bundle.architecture},
        "runtime": run.get("runtime"),
        "config_digest": config_digest(subject.config),
        "key": key,
        **_added(subject, judged),
        "cost": {name: [cost.to_json() for cost in own] for name, own in costs.items()},
    }


def _added(subject: Subject, judged: Judged) -> dict[str, Any]:
    """What is in the document only where it was asked for: slices, the comparison."""
    added: dict[str, Any] = {}
    if judged.slicings:
        added["slices"] = {slicing.column: slicing.to_json() for slicing in judged.slicings}
    if judged.comparison is not None and subject.other is not None:
        other = subject.other
        told = {"path": str(other.path), "digest": other.model_digest, "architecture": other.architecture}
        added["comparison"] = {"model": told, **judged.comparison.to_json()}
    return added


def _findings(judged: Judged) -> list[Block]:
    """The page's blocks of comparison and slices."""
    found = judged.evaluation
    lead = "map" if found.is_multi_label else "top1"
    compared = [] if judged.comparison is None else list(comparison_blocks(judged.comparison))
    return [*compared, *slices_blocks(judged.slicings, lead, found.metrics.scalars[lead])]


def _about(subject: Subject, judged: Judged, costs: Mapping[str, Sequence[Cost]], ended: str) -> About:
    scored = judged.scored
    config, bundle, splits, labels = subject.config, subject.bundle, subject.splits, subject.index.labels
    names = {label.id: label.name or label.id for label in bundle.labels}
    kept = np.flatnonzero(subject.keep)[scored.is_scored]
    run = read_run(subject.root / SCORING) or {}
    runtime = run.get("runtime", {})
    left_out = {reason: number for reason, number in _left_out(subject, scored).items() if number}
    model = f"{last_name(str(bundle.path))} ({bundle.architecture})"
    part = f"{share(len(kept), len(subject.keep))} of {count(len(subject.keep), 'image')}"
    facts = {
        "Corpus": str(subject.corpus.path),
        "Split": f"{config.split}: {part}; by {splits.how}",
        "Splits": ", ".join(f"{name} {number:,}" for name, number in splits.counts.items()),
        "Groups": f"column {splits.group_column!r}: drawn as a whole" if splits.group_column else "none",
        "Left out": ", ".join(f"{number:,} {reason}" for reason, number in left_out.items()) or "nothing",
        "Task": "several labels an image" if subject.is_multi_label else "one label an image",
        "Model": model,
        "Runtime": " ".join(str(runtime[key]) for key in ("name", "version", "precision", "device") if key in runtime),
    }  # fmt: skip
    if len(bundle.labels) > (kept_labels := int(run.get("config", {}).get("top_k", len(bundle.labels)))):
        facts["Probabilities"] = f"the {kept_labels:,} highest of an image; the others count as 0 in ROC-AUC and mAP"
    counts = np.zeros((len(bundle.labels), len(splits.names)), np.int64)
    place = {name: at for at, name in enumerate(bundle.label_ids)}
    for name, row in zip(labels.names, splits.class_counts(labels), strict=True):
        if name in place:
            counts[place[name]] = row
    return About(
        title=f"Evaluation on {last_name(str(subject.corpus.path))}",
        created=ended,
        subtitle=f"of the model {model}",
        where="" if config.split == "all" else f"of the split {config.split}",
        uris=[uri for uri, is_scored in zip(scored.uris, scored.is_scored, strict=True) if is_scored],
        truths=[[names[label] for label in labels.of_image(int(at))] for at in kept],
        facts=facts,
        warnings=subject.warnings,
        splits=(splits.names, counts),
        digests={
            "corpus": subject.corpus.digest,
            "model": bundle.model_digest,
            "split": splits.digest,
            "configuration": config_digest(config),
        },
        findings=_findings(judged),
        costs=evaluate_costs.blocks(subject, judged, costs),
        command=shlex.join(["eagleray", *sys.argv[1:]]) if len(sys.argv) > 1 else "",
    )
