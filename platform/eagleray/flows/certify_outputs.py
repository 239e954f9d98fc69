"""What a certification leaves: certificate.json, the page, the bundle with its policy, record.json; and whether it has.

The certificate is written first, the bundle then, the record last: what was interrupted is finished by the same
command, and a bundle of this very key is never written twice.

Example:
    >>> read_finished(plan, key(plan))["kpi"]
    'precision(crack)>=0.95@0.95; maximize recall(crack)'
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagleray import __version__
from eagleray.assure.certificate import SCHEMA, Certificate
from eagleray.assure.certificate_report import About, certificate_report
from eagleray.assure.phrases import last_name
from eagleray.assure.thresholds import METHOD
from eagleray.core import commits, storage
from eagleray.core.config import digest as config_digest
from eagleray.core.config import digest_json
from eagleray.core.errors import ArtifactError, ConfigError, EagleError
from eagleray.core.records import Record, read_record
from eagleray.flows.evaluate import SCORING
from eagleray.flows.evaluate_outputs import PAGE, RECORD, REPORT
from eagleray.flows.score_outputs import read_run, versions
from eagleray.vision.bundle import HEAD, load_bundle, save_bundle
from eagleray.vision.evidence import Claim, Evidence
from eagleray.vision.prediction import ThresholdPolicy

if TYPE_CHECKING:
    from eagleray.flows.certify import Plan

CERTIFICATE = "certificate.json"
ELSEWHERE = (  # change no figure: where it runs, how it is shown
    *("corpus", "model", "out", "address", "workers", "num_cpus", "num_gpus", "threads", "decode_threads"),
    *("batch_size", "in_process_below", "has_report"),
)


def key(plan: Plan) -> str:
    """Digest of all that the certificate depends on."""
    subject = plan.subject
    return digest_json(
        {
            "schema": SCHEMA,
            "model": subject.bundle.model_digest,
            "image_spec": subject.bundle.image_spec.digest,
            "corpus": subject.corpus.digest,
            "split": [subject.config.split, subject.splits.digest],
            "kpi": plan.task.kpi.text,
            "config": config_digest(plan.config, exclude=(*ELSEWHERE, "kpi")),
        }
    )


def refuse_occupied(plan: Plan, wanted: str) -> None:
    """The bundle's folder is absent, empty, or holds the bundle of this very certification.

    Raises:
        ConfigError: It holds something else.
    """
    out = Path(plan.config.out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / HEAD).is_file():
        raise ConfigError(f"{out} is not empty and is no bundle", expected="a new folder", fix="give another --out")
    if (load_bundle(out).lineage.get("certified") or {}).get("key") != wanted:
        raise ConfigError(
            f"{out} holds a bundle that this command did not make: another model, corpus, KPI or setting",
            expected="a new folder, or the bundle of this very command",
            fix="give another --out",
        )


def read_finished(plan: Plan, wanted: str) -> dict[str, Any] | None:
    """The summary of what is there, when it is of this key and every file holds; None otherwise.

    Raises:
        ArtifactError: A certificate of a newer schema, or a bundle that does not hold.
    """
    try:
        document: dict[str, Any] = storage.read_json(plan.root / CERTIFICATE)
    except (FileNotFoundError, ValueError):
        return None
    if document.get("schema", 0) > SCHEMA:
        raise ArtifactError(
            f"{plan.root / CERTIFICATE} has schema {document['schema']}",
            expected=f"{SCHEMA} or older",
            fix="use a newer eagleray",
        )
    if document.get("key") != wanted or not document.get("is_met") or not (Path(plan.config.out) / HEAD).is_file():
        return None
    if not (plan.root / RECORD).exists():
        return _finish(plan, document)
    try:
        record = read_record(plan.root / RECORD)
    except EagleError:
        return None
    holds = all(
        path.is_file() and storage.sha256_file(path) == digest
        for path, digest in ((_place(plan, name), digest) for name, digest in record.subjects.items())
    )
    has_page = PAGE in record.subjects or not plan.config.has_report
    return _summary(plan, document) if holds and has_page else None


def write_certificate(plan: Plan, key: str, made: Certificate) -> dict[str, Any]:
    """certificate.json, report.json and the page, of a KPI that was met or not.

    Returns:
        The certificate.
    """
    root = plan.root
    for name in (RECORD, PAGE):
        (root / name).unlink(missing_ok=True)
    subject, run = plan.subject, read_run(plan.root / SCORING) or {}
    attempt = _attempt(plan, key)
    document = {
        **made.to_json(),
        "split": {"name": subject.config.split, **subject.splits.to_json()},
        "left_out": dict(subject.left_out),
        "corpus": {"path": str(subject.corpus.path), "digest": subject.corpus.digest},
        "model": {"path": str(subject.bundle.path), "digest": subject.bundle.model_digest},
        "runtime": run.get("runtime"),
        "config_digest": config_digest(plan.config),
        "certified_at": _date(plan),
        "attempt": attempt,
        "key": key,
    }
    report = certificate_report(made, _about(plan, made, document))
    storage.write_json(root / REPORT, report.to_json())
    if plan.config.has_report:
        from eagleray.pages.page import write_page

        write_page(root, report)
    storage.write_json(root / CERTIFICATE, document)
    return document


def _attempt(plan: Plan, key: str) -> int:
    """Which certification of this folder this is: another KPI or setting on the same images counts one more."""
    try:
        before = storage.read_json(plan.root / CERTIFICATE)
        number = int(before["attempt"])
        return number if before["key"] == key else number + 1
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return 1


def _date(plan: Plan) -> str:
    """When it was certified: of a bundle that is there already, then; otherwise now."""
    if (Path(plan.config.out) / HEAD).is_file():
        return str(load_bundle(plan.config.out).lineage["certified"]["at"])
    return datetime.now(UTC).isoformat(timespec="seconds")


def publish(plan: Plan, document: dict[str, Any]) -> dict[str, Any]:
    """Saves the bundle with the policy that the certificate proves, then the record.

    Raises:
        ConfigError: ``out`` has come to hold something else.
        ArtifactError: The bundle that was certified has changed meanwhile.
    """
    parent, out = plan.subject.bundle, Path(plan.config.out)
    if not (out / HEAD).is_file():
        draft = replace(
            parent,
            policy=replace(ThresholdPolicy.from_json(document["policy"]), evidence=_evidence(document)),
            lineage={**parent.lineage, "certified": {"key": document["key"], "at": document["certified_at"]}},
            files={},
            path=Path(),
        )
        saved = save_bundle(out, draft, {name: parent.path / name for name in parent.files})
        if dict(saved.files) != dict(parent.files):
            raise ArtifactError(
                f"{parent.path} changed while it was certified", expected="the files that were scored", fix="run again"
            )
    return _finish(plan, document)


def _evidence(document: dict[str, Any]) -> Evidence:
    return Evidence(
        kpi=document["kpi"],
        claims=tuple(Claim.from_json(claim) for claim in document["claims"]),
        method=METHOD,
        corpus=document["corpus"]["digest"],
        split=document["split"]["name"],
        split_digest=document["split"]["digest"],
        num_selection=document["num_selection"],
        num_certification=document["num_certification"],
        model=document["model"]["digest"],
        certified_at=document["certified_at"],
    )


def _finish(plan: Plan, document: dict[str, Any]) -> dict[str, Any]:
    """record.json: the last word."""
    root, bundle = plan.root, load_bundle(plan.config.out)
    names = [name for name in (CERTIFICATE, REPORT, PAGE) if (root / name).exists()]
    subjects = {name: storage.sha256_file(root / name) for name in names}
    subjects[f"bundle/{HEAD}"] = storage.sha256_file(bundle.path / HEAD)
    subjects |= {f"bundle/{name}": digest for name, digest in bundle.files.items()}
    inputs = {
        "corpus": document["corpus"]["digest"],
        "model": document["model"]["digest"],
        "split": document["split"]["digest"],
        "scores": storage.sha256_file(root / SCORING / commits.MANIFEST),
    }
    predicate = {
        "config_digest": document["config_digest"],
        "key": document["key"],
        "kpi": document["kpi"],
        "policy_digest": bundle.policy.digest if bundle.policy else "",
        "versions": versions(),
        "eagleray": __version__,
        "ended_at": document["certified_at"],
    }
    record = Record(kind="certify", subjects=subjects, inputs=inputs, predicate=predicate)
    storage.write_json(root / RECORD, record.to_json())
    return _summary(plan, document)


def _summary(plan: Plan, document: dict[str, Any]) -> dict[str, Any]:
    page = plan.root / PAGE
    return {
        **document,
        "bundle": plan.config.out,
        "run": str(plan.root),
        "report": str(page) if page.exists() else "",
    }


def _place(plan: Plan, name: str) -> Path:
    """Where a subject of the record lies."""
    inside = name.removeprefix("bundle/")
    return plan.root / name if inside == name else Path(plan.config.out) / inside


def _training(plan: Plan) -> str:
    """What the bundle says of the images that it was trained on, and what follows."""
    trained = plan.subject.bundle.lineage.get("trained_on")
    if not trained:
        return (
            "The bundle does not say which images it was trained on: that they are others than these was not checked."
        )
    if trained.get("corpus") != plan.subject.corpus.digest:
        return "The model was trained on another corpus: that none of its images is in this one was not checked."
    return (
        f"The model was trained on {', '.join(trained.get('names', ()))} of this corpus, and on none of these images."
    )


def _about(plan: Plan, made: Certificate, document: dict[str, Any]) -> About:
    subject, bundle = plan.subject, plan.subject.bundle
    runtime = document["runtime"] or {}
    left_out = {**subject.left_out, "that could not be read": made.about["unread"]}
    told = ", ".join(f"{number:,} {reason}" for reason, number in left_out.items() if number)
    facts = {
        "KPI": document["kpi"],
        "Corpus": str(subject.corpus.path),
        "Split": f"{subject.config.split}, by {subject.splits.how}",
        "Not used": f"{made.about['set_aside']:,} images of it: held back, or not the one of their group",
        "Left out": told or "nothing",
        "Labels that the KPI does not name": {
            "abstain": "never decided",
            "decide": "decided where most probable, without a claim",
        }[plan.config.others]
        if plan.task.kpi.labels
        else "the KPI is of all labels together",
        "Otherwise": f"the decision is {made.policy.otherwise!r}",
        "Model": f"{last_name(str(bundle.path))} ({bundle.architecture})",
        "Runtime": " ".join(
            str(runtime[name]) for name in ("name", "version", "precision", "device") if name in runtime
        ),
        "Method": METHOD,
    }
    return About(
        title=f"Certificate of {last_name(plan.config.out)}",
        created=document["certified_at"],
        subtitle=f"the model {last_name(str(bundle.path))} on {last_name(str(subject.corpus.path))}",
        unit=plan.pieces.unit,
        names={label.id: label.name for label in bundle.labels},
        attempt=document["attempt"],
        training=_training(plan),
        facts=facts,
        digests={
            "corpus": subject.corpus.digest,
            "split": subject.splits.digest,
            "model": bundle.model_digest,
            "policy": made.policy.digest,
            "configuration": document["config_digest"],
        },
        command=shlex.join(["eagleray", *sys.argv[1:]]) if len(sys.argv) > 1 else "",
    )
