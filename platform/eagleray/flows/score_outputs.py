"""What a scoring run leaves beside its parts: the manifest, run.json, quarantine.parquet, record.json and the page.

Example:
    >>> read_run(Path("runs/photos"))["state"]
    'finished'
"""

from __future__ import annotations

import platform
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from eagleray import __version__
from eagleray.core import commits, storage
from eagleray.core.commits import Ledger
from eagleray.core.config import digest as config_digest
from eagleray.core.errors import ArtifactError, RunIncomplete
from eagleray.core.records import Record
from eagleray.vision import resample

if TYPE_CHECKING:
    from eagleray.flows.score import Plan

SCHEMA = 1
QUARANTINE_SCHEMA = pa.schema(
    [("uri", pa.string()), ("id", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
)
PACKAGES = (
    *("eagleray", "ray", "torch", "onnxruntime", "openvino", "simplejpeg", "pillow", "numpy", "pyarrow"),
    *("scikit-learn", "scipy"),
)


def read_run(root: Path) -> dict[str, Any] | None:
    """run.json of a folder, or None when there is none.

    Raises:
        ArtifactError: It is not JSON, or of a newer schema.
    """
    try:
        run: dict[str, Any] = storage.read_json(root / "run.json")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ArtifactError(f"{root}/run.json is not JSON", expected="as written", fix="use a new --out") from error
    if run.get("schema", 0) > SCHEMA:
        raise ArtifactError(
            f"{root}/run.json has schema {run['schema']}", expected=f"{SCHEMA} or older", fix="use a newer eagleray"
        )
    return run


def is_finished(plan: Plan, previous: Mapping[str, Any] | None) -> bool:
    """Whether the folder's manifest is the one of this plan."""
    return bool(
        previous
        and previous.get("state") == "finished"
        and previous.get("ledger_key") == plan.key
        and previous.get("input_digest") == plan.frozen.digest
        and (plan.root / commits.MANIFEST).exists()
        and (not plan.config.has_report or (plan.root / "report.html").exists())
    )


def write_running(plan: Plan, started: datetime) -> None:
    """run.json as it stands while the run is under way: what a resume must find again."""
    storage.write_json(plan.root / "run.json", {**_head(plan, started), "state": "running"})


def finish(
    plan: Plan,
    ledger: Ledger,
    where: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]],
    history: Sequence[Mapping[str, float]],
    started: datetime,
) -> dict[str, Any]:
    """Seals the run: manifest first (it must balance), then what explains it, then garbage and page.

    Returns:
        The summary.

    Raises:
        RunIncomplete: A unit is missing or the totals do not balance.
    """
    root, parts = plan.root, _parts(plan, ledger)
    totals = {name: sum(part[name] for part in parts) for name in ("scored", "quarantined", "inferred")}
    head = {
        "images_in": plan.frozen.images_in,
        "scored": totals["scored"],
        "quarantined": totals["quarantined"],
        "model_digest": plan.bundle.model_digest,
    }
    manifest = commits.seal(root, head, parts)
    _write_quarantine(root)
    run = {
        **_head(plan, started),
        **head,
        "state": "finished",
        "inferred": totals["inferred"],
        **_timings(started, answers, parts),
        "where": dict(where),
        "workers": _workers(answers),
        "progress": list(history),
    }
    storage.write_json(root / "run.json", run)
    _write_record(plan, run, manifest)
    commits.collect_garbage(root, "scores", manifest)
    _drop_stale_ledgers(root, plan.key)
    if plan.config.has_report:
        from eagleray.flows import report

        report.rebuild(root)
    return summary(run, done_now=sum(answer["rows"] for answer in answers))


def summary(run: Mapping[str, Any], *, done_now: int) -> dict[str, Any]:
    """What a verb prints of a run."""
    keep = ("images_in", "scored", "quarantined", "images_per_s", "seconds", "out", "runtime", "where", "model")
    page = Path(run["out"]) / "report.html"
    return {**{name: run[name] for name in keep}, "done_now": done_now, "report": str(page) if page.exists() else ""}


def _parts(plan: Plan, ledger: Ledger) -> list[dict[str, Any]]:
    done = ledger.committed()
    missing = [unit["unit"] for unit in plan.frozen.units if unit["unit"] not in done]
    wrong = [u["unit"] for u in plan.frozen.units if u["unit"] in done and done[u["unit"]]["images"] != u["images"]]
    if missing or wrong:
        raise RunIncomplete(
            f"{len(missing)} units are not committed, {len(wrong)} hold another number of images: "
            + ", ".join((missing + wrong)[:5]),
            expected=f"{len(plan.frozen.units)} units",
            fix="run the same command again: it does what is missing",
        )
    return [done[unit["unit"]] for unit in plan.frozen.units]


def _head(plan: Plan, started: datetime) -> dict[str, Any]:
    bundle = plan.bundle
    return {
        "schema": SCHEMA,
        "command": ["eagleray", *sys.argv[1:]] if len(sys.argv) > 1 else [],
        "command_line": shlex.join(["eagleray", *sys.argv[1:]]),
        "config": plan.config.model_dump(mode="json"),
        "config_digest": config_digest(plan.config),
        "source": {"path": plan.frozen.source, "kind": plan.frozen.kind, "digest": plan.frozen.digest},
        "input_digest": plan.frozen.digest,
        "out": str(plan.root),
        "model": {"digest": bundle.model_digest, "path": str(bundle.path), "architecture": bundle.architecture},
        "image_spec_digest": bundle.image_spec.digest,
        "runtime": dict(plan.runtime),
        "ledger_key": plan.key,
        "key_fields": dict(plan.key_fields),
        "versions": versions(),
        "started_at": started.isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    found = {"python": platform.python_version(), "resize_kernel": resample.kernel()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _timings(
    started: datetime, answers: Sequence[Mapping[str, Any]], parts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Seconds of the whole run and of its steady part: first unit begun to last unit committed."""
    ended = datetime.now(UTC)
    rows = sum(answer["rows"] for answer in answers)
    steady = max(a["ended"] for a in answers) - min(a["started"] for a in answers) if answers else 0.0
    seconds = (ended - started).total_seconds()
    cpu = sum(part["cpu_s"] for part in parts)
    return {
        "ended_at": ended.isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "seconds_steady": round(steady, 3),
        "images_per_s": round(rows / seconds, 2) if seconds > 0 else 0.0,
        "images_per_s_steady": round(rows / steady, 2) if steady > 0 else 0.0,
        "cpu_s": round(cpu, 3),
        "gpu_s": 0.0 if not parts else round(sum(part.get("gpu_s", 0.0) for part in parts), 3),
    }


def _workers(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each worker did."""
    table: dict[tuple[str, int], dict[str, Any]] = {}
    for answer in answers:
        row = table.setdefault(
            (answer["node"], answer["pid"]),
            {"node": answer["node"], "pid": answer["pid"], "units": 0, "images": 0, "seconds": 0.0},
        )
        row["units"] += 1
        row["images"] += answer["rows"]
        row["seconds"] = round(row["seconds"] + answer["ended"] - answer["started"], 3)
    return list(table.values())


def _write_quarantine(root: Path) -> None:
    columns = [*QUARANTINE_SCHEMA.names, "status"]
    found = [QUARANTINE_SCHEMA.empty_table()]
    for part in commits.read_parts(root, columns):
        refused = part.filter(pc.equal(part["status"], "quarantined"))
        if refused.num_rows:
            found.append(refused.select(QUARANTINE_SCHEMA.names).cast(QUARANTINE_SCHEMA))
    storage.write_table(pa.concat_tables(found), root / "quarantine.parquet")


def _write_record(plan: Plan, run: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    subjects = {part["path"]: part["sha256"] for part in manifest["parts"]}
    for name in (commits.MANIFEST, "quarantine.parquet"):
        subjects[name] = storage.sha256_file(plan.root / name)
    inputs = {"model": plan.bundle.model_digest, "input": plan.frozen.digest}
    inputs |= {f"model/{name}": digest for name, digest in plan.bundle.files.items()}
    keep = ("config_digest", "versions", "runtime", "images_in", "scored", "quarantined", "started_at", "ended_at")
    predicate = {
        **{name: run[name] for name in keep},
        "image_spec_digest": plan.bundle.image_spec.digest,
        "policy_digest": plan.key_fields["policy_digest"],
        "eagleray": __version__,
    }
    record = Record(kind="score", subjects=subjects, inputs=inputs, predicate=predicate)
    storage.write_json(plan.root / "record.json", record.to_json())


def _drop_stale_ledgers(root: Path, key: str) -> None:
    """Removes ledgers of other keys: their parts no longer count and were collected."""
    for home in _ledgers(root):
        if home.name != key[:20]:
            shutil.rmtree(home, ignore_errors=True)


def _ledgers(root: Path) -> Iterator[Path]:
    yield from (path for path in (root / commits.LEDGER).iterdir() if path.is_dir())
