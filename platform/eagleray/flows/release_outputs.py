"""What a release leaves: release.json (the table), report.json, report.html, record.json; and the bundle's lineage.

Example:
    >>> read_finished(config, key)["rows"][-1]["speedup"]
    1.72
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eagleray import __version__
from eagleray.assure.cost import Cost, Work, cheapest, price
from eagleray.assure.cost_report import cost_blocks
from eagleray.assure.phrases import figure, last_name
from eagleray.assure.release_report import About, points, release_report
from eagleray.assure.release_table import StepRow
from eagleray.core import storage
from eagleray.core.config import digest as config_digest
from eagleray.core.errors import EagleError
from eagleray.core.records import Record, read_record
from eagleray.flows.evaluate_outputs import PAGE, RECORD, REPORT
from eagleray.flows.profiles import node_shapes
from eagleray.flows.release_plan import ReleaseConfig, Step
from eagleray.flows.training_outputs import versions
from eagleray.vision.bundle import ModelBundle, load_bundle
from eagleray.vision.corpus import open_corpus

TABLE = "release.json"
SCHEMA = 1


def line(row: StepRow) -> str:
    """A row in one line, as it is printed when it is judged."""
    parts = [
        f"{row.name}: {row.model_bytes / 1e6:.1f} MB",
        f"{figure(row.images_per_s)} images/s on {row.engine}",
        f"p50 {figure(row.latency_ms_p50)} ms",
        f"accuracy {row.accuracy.text}",
    ]
    if row.speedup is not None:
        parts.insert(2, f"{row.speedup:.2f} x the parent")
    if row.change is not None:
        parts.append(f"change {points(row.change)} points")
    failed = [f"{gate.name} FAILED ({gate.seen})" for gate in row.gates if not gate.is_passed]
    return ", ".join([*parts, *(failed or (["gates passed"] if row.gates else []))])


def lineage(
    config: ReleaseConfig, key: str, parent: ModelBundle, asked: Sequence[Step], rows: Sequence[StepRow]
) -> dict[str, Any]:
    """What the released bundle says of how it was made, besides what its last step says."""
    told = [
        {"step": step.name, "settings": dict(step.settings), "model_digest": row.model_digest}
        for step, row in zip(asked, rows[1:], strict=True)
    ]
    last = rows[-1]
    measured = {
        "accuracy": last.accuracy.to_json(),
        "change": last.change.to_json() if last.change else None,
        "speedup": last.speedup,
        "engine": last.engine,
    }
    source = {"bundle": str(parent.path), "model_digest": parent.model_digest}
    release = {"key": key, "parent": source, "steps": told, "measured": measured}
    release |= {"corpus_digest": open_corpus(config.corpus).digest, "config_digest": config_digest(config)}
    return {"release": {**release, "versions": versions(), "eagleray": __version__}}


def read_finished(config: ReleaseConfig, key: str) -> dict[str, Any] | None:
    """The summary of this very release, when it is published and every file holds; None otherwise."""
    root = config.root
    try:
        found: dict[str, Any] = storage.read_json(root / TABLE)
        record = read_record(root / RECORD)
        own = load_bundle(config.out).lineage.get("release") or {}
    except (FileNotFoundError, ValueError, EagleError):
        return None
    has_page = PAGE in record.subjects or not config.has_report
    holds = all(
        (root / name).is_file() and storage.sha256_file(root / name) == digest
        for name, digest in record.subjects.items()
        if not name.startswith("bundle/")
    )
    return _summary(root, found) if holds and has_page and found.get("key") == own.get("key") == key else None


def write(
    config: ReleaseConfig,
    key: str,
    parent: ModelBundle,
    rows: Sequence[StepRow],
    notes: Sequence[str],
    *,
    published: ModelBundle | None = None,
) -> dict[str, Any]:
    """Writes the table, the page and, of a release that is published, the record; the record last.

    Returns:
        The summary.
    """
    root, ended = config.root, datetime.now(UTC).isoformat(timespec="seconds")
    (root / RECORD).unlink(missing_ok=True)
    costs = _costs(rows)
    best = cheapest(costs, meets=[row.name for row in rows if row.is_passed])
    document = {
        "schema": SCHEMA,
        "key": key,
        "state": "released" if published else "stopped",
        "bundle": str(config.out) if published else "",
        "digest": published.model_digest if published else "",
        "rows": [row.to_json() for row in rows],
        "notes": list(notes),
        "cost": {name: [cost.to_json() for cost in own] for name, own in costs.items()},
        "cheapest": best.text if best else "",
        "config": config.model_dump(mode="json"),
        "ended_at": ended,
    }
    storage.write_json(root / TABLE, document)
    report = release_report(rows, _about(config, parent, rows, notes, costs, ended))
    storage.write_json(root / REPORT, report.to_json())
    written = [TABLE, REPORT]
    if config.has_report:
        from eagleray.pages.page import write_page

        write_page(root, report)
        written.append(PAGE)
    if published is not None:
        _write_record(config, key, parent, published, written)
    return _summary(root, document)


def _summary(root: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    page = root / PAGE
    keep = ("state", "bundle", "digest", "rows", "notes", "cheapest")
    return {
        **{name: document[name] for name in keep},
        "run": str(root),
        "report": str(page) if page.exists() else "",
    }


def _costs(rows: Sequence[StepRow]) -> dict[str, list[Cost]]:
    shapes = node_shapes()
    works = {row.name: Work(row.core_s_per_image, row.gpu_s_per_image, row.gpu) for row in rows}
    return {name: [price(work, shape) for shape in shapes] for name, work in works.items()}


def _about(
    config: ReleaseConfig,
    parent: ModelBundle,
    rows: Sequence[StepRow],
    notes: Sequence[str],
    costs: Mapping[str, Sequence[Cost]],
    ended: str,
) -> About:
    limits = config.limits
    kpi = f"a drop of at most {limits.max_drop_points:g} points and every other gate"
    what = "decoding and the model, each timed here on one core (or GPU); reading and writing are left out"
    passed = [row.name for row in rows if row.is_passed]
    corpus = open_corpus(config.corpus)
    facts = {
        "Parent": f"{parent.path} ({parent.architecture})",
        "Corpus": str(config.corpus),
        "Judged on": f"the split {config.split}",
        "Trained and calibrated on": f"the split {config.train_split}",
        "Steps": "; ".join(row.what for row in rows[1:]),
        "Timed with": f"{config.threads} threads, {config.device}; {config.rounds} turns",
        "Steps' bundles": str(config.root),
    }
    return About(
        title=f"Release of {last_name(str(parent.path))}",
        subtitle=f"judged on {last_name(str(corpus.path))}, split {config.split}",
        created=ended,
        limits=limits,
        labels={label.id: label.name or label.id for label in parent.labels},
        notes=notes,
        facts=facts,
        costs=list(cost_blocks(costs, meets=passed, kpi=kpi, what=what)),
        digests={"parent": parent.model_digest, "corpus": corpus.digest, "configuration": config_digest(config)},
        command=shlex.join(["eagleray", *sys.argv[1:]]) if len(sys.argv) > 1 else "",
    )


def _write_record(
    config: ReleaseConfig, key: str, parent: ModelBundle, published: ModelBundle, written: Sequence[str]
) -> None:
    root = config.root
    subjects = {name: storage.sha256_file(root / name) for name in written}
    subjects |= {f"bundle/{name}": digest for name, digest in published.files.items()}
    subjects["bundle/bundle.json"] = storage.sha256_file(published.path / "bundle.json")
    predicate = {
        "config_digest": config_digest(config),
        "key": key,
        "model_digest": published.model_digest,
        "versions": versions(),
        "eagleray": __version__,
    }
    inputs = {"parent": parent.model_digest, "corpus": open_corpus(config.corpus).digest}
    record = Record(kind="release", subjects=subjects, inputs=inputs, predicate=predicate)
    storage.write_json(root / RECORD, record.to_json())
