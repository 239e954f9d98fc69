"""What a thing on disk is: a corpus, a bundle, scores, an evaluation, or a record: counts, digests, lineage.

What is small is verified byte for byte, so that a flipped byte is found here and not in the middle of a run; of what is
large the size is compared, and the answer says how much was verified in which way. Nothing is changed.

Example:
    >>> describe("runs/photos")["images_in"]
    2013
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eagleray.core import commits, storage
from eagleray.core.errors import ArtifactError, DataError
from eagleray.core.records import STATEMENT_TYPE, Record, read_record

SMALL_BYTES = 16 * 2**20  # about 10 ms of SHA-256: a thousand parts still answer in seconds
KINDS = {
    "manifest.json": "a corpus",
    "bundle.json": "a bundle",
    commits.MANIFEST: "scores",
    "run.json": "scores",
    "metrics.json": "an evaluation",
    "certificate.json": "a certificate",
    "release.json": "a release",
}


class Verified(NamedTuple):
    """How many files hold by their digest, and how many by their size only."""

    by_digest: int
    by_size: int


def describe(path: str | Path) -> dict[str, Any]:
    """Says what lies at a path.

    Args:
        path: A folder, or a record.json.

    Returns:
        ``kind`` (corpus, bundle, scores, evaluation, certificate, release, record) and what belongs to it, as JSON.

    Raises:
        DataError: There is nothing at the path.
        ArtifactError: It is none of ours, of a newer schema, or a digest does not hold.
    """
    path = Path(path)
    if path.is_file():
        return _record(path)
    if not path.is_dir():
        raise DataError(f"there is no {path}", expected="a folder or a record.json", fix="check the path")
    if (path / "bundle.json").exists():
        return _bundle(path)
    if (path / commits.MANIFEST).exists():
        return _scores(path)
    if (path / "run.json").exists():
        return _unfinished(path)
    if (path / "metrics.json").exists():
        return _evaluation(path)
    if (path / "certificate.json").exists():
        return _certificate(path)
    if (path / "release.json").exists():
        return _release(path)
    if (path / "manifest.json").exists() or (path / "_ingest").is_dir():
        return _corpus(path)
    near = [f"{child} ({kind})" for child in sorted(path.iterdir()) if (kind := _kind(child))]
    raise ArtifactError(
        f"{path} is no corpus, bundle, scores folder, evaluation, certificate, release or record",
        expected=f"a folder with one of {', '.join(KINDS)}, or a record.json",
        fix=f"inspect one of {', '.join(near[:4])}" if near else "check the path",
    )


def _kind(path: Path) -> str:
    return next((kind for name, kind in KINDS.items() if (path / name).is_file()), "") if path.is_dir() else ""


def _bundle(path: Path) -> dict[str, Any]:
    from eagleray.vision.bundle import load_bundle

    bundle = load_bundle(path)  # verifies every file, large ones too: nothing in it may be taken on trust
    return {
        "kind": "bundle",
        "path": str(path),
        "schema": bundle.schema,
        "architecture": bundle.architecture,
        "model_digest": bundle.model_digest,
        "num_labels": len(bundle.labels),
        "labels": list(bundle.label_ids),
        "output": bundle.output,
        "embedding_dim": bundle.embedding_dim,
        "image_spec": {**bundle.image_spec.to_json(), "digest": bundle.image_spec.digest},
        "policy": {**bundle.policy.to_json(), "digest": bundle.policy.digest} if bundle.policy else None,
        "lineage": dict(bundle.lineage),
        "files": dict(bundle.files),
        "verified": Verified(len(bundle.files), 0)._asdict(),
    }


def _corpus(path: Path) -> dict[str, Any]:
    from eagleray.vision.corpus import open_corpus

    corpus = open_corpus(path)
    listed = [*corpus.shards, *({"path": name, **entry} for name, entry in corpus.files.items())]
    return {
        "kind": "corpus",
        "path": str(path),
        "schema": corpus.schema,
        "digest": corpus.digest,
        "uris_in": corpus.uris_in,
        "images": corpus.images,
        "duplicates": corpus.duplicates,
        "quarantined": corpus.quarantined,
        "reasons": _reasons(path),
        "shards": len(corpus.shards),
        "bytes": sum(shard["bytes"] for shard in corpus.shards),
        "columns": list(corpus.columns),
        "sources": list(corpus.sources),
        "verified": _verify(path, listed)._asdict(),
    }


def _scores(path: Path) -> dict[str, Any]:
    manifest = commits.read_manifest(path)
    run = _read_optional(path / "run.json")
    record = read_record(path / "record.json") if (path / "record.json").exists() else None
    verified = _verify(path, manifest["parts"])
    if record is not None:
        _agree(path, record, manifest)
    return {
        "kind": "scores",
        "path": str(path),
        "state": run.get("state", "finished"),
        "schema": manifest["schema"],
        "images_in": manifest["images_in"],
        "scored": manifest["scored"],
        "quarantined": manifest["quarantined"],
        "reasons": _reasons(path),
        "model_digest": manifest["model_digest"],
        "parts": len(manifest["parts"]),
        "rows": sum(part["rows"] for part in manifest["parts"]),
        **{
            key: run[key]
            for key in ("source", "model", "runtime", "started_at", "seconds", "images_per_s")
            if key in run
        },
        "record": "record.json agrees with the manifest" if record else "none",
        "report": str(path / "report.html") if (path / "report.html").exists() else "",
        "verified": verified._asdict(),
    }


def _evaluation(path: Path) -> dict[str, Any]:
    found, record = _read_optional(path / "metrics.json"), read_record(path / "record.json")
    listed = [{"path": name, "sha256": digest} for name, digest in record.subjects.items()]
    figures = ("top1", "top5", "balanced_accuracy", "f1_macro", "map", "roc_auc", "ece")
    return {
        "kind": "evaluation",
        "path": str(path),
        "schema": found.get("schema"),
        "images": found.get("n"),
        "task": found.get("task"),
        **{name: found.get(name) for name in figures},
        **{name: found.get(name) for name in ("split", "left_out", "warnings", "corpus", "model", "runtime")},
        "verified": _verify(path, listed)._asdict(),
    }


def _certificate(path: Path) -> dict[str, Any]:
    """The run of a certification; of the bundle, which lies elsewhere, the digest is told and not compared."""
    keep = ("kpi", "is_met", "policy", "claims", "objective", "split", "num_selection", "num_certification")
    return _run_of(path, "certificate", (*keep, "corpus", "model", "runtime", "certified_at"))


def _release(path: Path) -> dict[str, Any]:
    """The run of a release: its table; the record is there once it is published."""
    return _run_of(path, "release", ("state", "bundle", "digest", "rows", "notes", "cheapest", "ended_at"))


def _run_of(path: Path, kind: str, keep: Sequence[str]) -> dict[str, Any]:
    found, listed = _read_optional(path / f"{kind}.json"), []
    if (path / "record.json").exists():
        subjects = read_record(path / "record.json").subjects
        listed = [{"path": name, "sha256": digest} for name, digest in subjects.items() if "/" not in name]
    return {
        "kind": kind,
        "path": str(path),
        "schema": found.get("schema"),
        **{name: found.get(name) for name in keep},
        "verified": _verify(path, listed)._asdict(),
    }


def _unfinished(path: Path) -> dict[str, Any]:
    run = _read_optional(path / "run.json")
    found = {"kind": "scores", "path": str(path), "state": "unfinished", "schema": run.get("schema")}
    keys = ("source", "model", "runtime", "started_at", "command_line")
    return {**found, **{key: run[key] for key in keys if key in run}, "to finish": "run the same command again"}


def _record(path: Path) -> dict[str, Any]:
    try:
        statement = storage.read_json(path)
    except ValueError:
        statement = None
    if not isinstance(statement, Mapping) or statement.get("_type") != STATEMENT_TYPE:
        raise ArtifactError(
            f"{path} is no record",
            expected=f"an in-toto Statement {STATEMENT_TYPE}, as record.json is",
            fix="check the path",
        )
    record = read_record(path)
    listed = [{"path": name, "sha256": digest} for name, digest in record.subjects.items()]
    beside = [part for part in listed if (path.parent / part["path"]).is_file()]
    return {
        "kind": "record",
        "path": str(path),
        "of": record.kind,
        "schema": record.schema,
        "subjects": dict(record.subjects),
        "inputs": dict(record.inputs),
        "predicate": dict(record.predicate),
        "verified": {**_verify(path.parent, beside)._asdict(), "absent": len(listed) - len(beside)},
    }


def _verify(root: Path, parts: Iterable[Mapping[str, Any]]) -> Verified:
    """Compares what is listed with what is there.

    Raises:
        ArtifactError: A file is missing, or its size or digest is another; the message names it.
    """
    by_digest = by_size = 0
    for part in parts:
        path = root / part["path"]
        if not path.is_file():
            raise _broken(path, "is missing")
        size = path.stat().st_size
        if size != part.get("bytes", size):
            raise _broken(path, f"is {size:,} bytes, not {part['bytes']:,}")
        if size > SMALL_BYTES:
            by_size += 1
        elif storage.sha256_file(path) != part["sha256"]:
            raise _broken(path, "has changed")
        else:
            by_digest += 1
    return Verified(by_digest, by_size)


def _agree(path: Path, record: Record, manifest: Mapping[str, Any]) -> None:
    """The record beside a manifest must name the same parts by the same digests."""
    for part in manifest["parts"]:
        if record.subjects.get(part["path"]) != part["sha256"]:
            raise _broken(path / "record.json", f"says otherwise than the manifest about {part['path']}")


def _broken(path: Path, what: str) -> ArtifactError:
    return ArtifactError(f"{path} {what}", expected="the bytes as written", fix="get it again, or make it again")


def _reasons(path: Path) -> dict[str, int]:
    """How many were quarantined for which reason."""
    import pyarrow.parquet as pq

    file = path / "quarantine.parquet"
    if not file.exists():
        return {}
    counts: dict[str, int] = {}
    for reason in pq.read_table(file, columns=["reason"])["reason"].to_pylist():
        counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items()))


def _read_optional(path: Path) -> dict[str, Any]:
    try:
        found = storage.read_json(path)
    except FileNotFoundError:
        return {}
    except ValueError:
        raise _broken(path, "is not JSON") from None
    return found if isinstance(found, dict) else {}
