"""What a training run leaves: run.json, the bundle, record.json and the page.

Example:
    >>> finish(run, work, answer, made)["bundle"]
    'bundles/trash'
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagleray import __version__
from eagleray.core import storage
from eagleray.core.config import digest as config_digest
from eagleray.core.config import digest_json
from eagleray.core.errors import ArtifactError
from eagleray.core.records import Record
from eagleray.flows.run_folder import read_lines
from eagleray.flows.score_outputs import versions as base_versions
from eagleray.flows.training_run import Made, Run, command_line
from eagleray.vision.bundle import ONNX, SAFETENSORS, ModelBundle, save_bundle

if TYPE_CHECKING:
    from eagleray.infer.runtimes import Uint8
    from eagleray.learn.corpus_index import CorpusIndex
    from eagleray.learn.work import Work
    from eagleray.vision.images import ImageSpec

Prove = Callable[[ModelBundle], bytes]

SCHEMA = 1


def versions() -> dict[str, str]:
    """Versions of what weights may depend on."""
    from importlib import metadata

    found = base_versions()
    for name in ("timm", "lightly", "safetensors", "onnx"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_running(run: Run, work: Work) -> None:
    """run.json as it stands while the run is under way."""
    write_state(run, {**_head(run, work), "state": "running"})


def write_stopped(run: Run, answer: Mapping[str, Any]) -> None:
    """run.json of a run that was told to stop."""
    before = run.folder.read_run() or {}
    write_state(run, {**before, "state": "stopped", "step": answer["step"]})


def final_state(run: Run, work: Work) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """State dict of the task whose weights the result has: the averaged ones where an average was kept.

    Returns:
        That of the last step, or of the best by validation where the run keeps it; and which, for lineage and run.json:
        empty where nothing was validated.

    Raises:
        ArtifactError: The last checkpoint, or the best that was asked for, is not there or not whole.
    """
    from eagleray.learn.checkpoints import load_best, load_latest

    found = load_latest(run.folder.checkpoints, config=work.key)
    if found is None or found.checkpoint.progress.step < found.checkpoint.progress.num_steps:
        raise ArtifactError(
            f"{run.folder.checkpoints} holds no whole checkpoint of the last step",
            expected="the one that the run has just written",
            fix="run the same command again: it does what is missing",
        )
    if work.keeps_best_by:
        found = load_best(run.folder.checkpoints, work.keeps_best_by, config=work.key)
        if found is None:
            raise ArtifactError(
                f"no checkpoint in {run.folder.checkpoints} says its {work.keeps_best_by}",
                expected="that of the best step",
                fix="give keep=last, or train again in another folder",
            )
    checkpoint, state = found.checkpoint, found.checkpoint.state
    weights: Mapping[str, Any] = state["ema"]["state"] if "ema" in state else state["model"]
    if work.validation is None:
        return weights, {}
    rule = "best" if work.keeps_best_by else "last"
    kept = {"keep": rule, "step": checkpoint.progress.step, "images": len(work.validation.index), **checkpoint.metrics}
    return weights, {"validation": kept}


def write_state(run: Run, value: Mapping[str, Any]) -> None:
    """run.json."""
    storage.write_json(run.folder.root / "run.json", dict(value))


def finish(
    run: Run, work: Work, answer: Mapping[str, Any], made: Made, *, judge: Callable[[Run], dict[str, Any]] | None
) -> dict[str, Any]:
    """Saves the bundle, then what explains it.

    Args:
        run: The run.
        work: What was trained.
        answer: Of the workers.
        made: What the weights became.
        judge: Says what the bundle is worth, for run.json; None: nothing is asked.

    Returns:
        The summary.
    """
    bundle = write_bundle(run, work.key, work.index, made)
    ended = {
        "state": "finished",
        "step": answer["step"],
        "world_size": answer["world_size"],
        "device": answer["device"],
        "where": dict(run.where),
    }
    if "validation" in made.lineage:
        ended["validation"] = made.lineage["validation"]
    judged = judge(run) if judge else {}
    return close(run, work.key, bundle, {**_head(run, work), **ended, **judged})


def close(run: Run, key: Mapping[str, Any], bundle: ModelBundle, head: Mapping[str, Any]) -> dict[str, Any]:
    """run.json, record.json and the page of a run whose bundle is saved.

    Args:
        run: The run.
        key: What it is.
        bundle: What it made.
        head: What run.json says besides.
    """
    rows, starts = read_lines(run.folder.metrics), read_lines(run.folder.starts)
    value = {
        **head,
        "bundle": {"path": str(bundle.path), "digest": bundle.model_digest},
        "seconds": round(time.time() - run.started, 3),
        "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "starts": len(starts),
        "last": {name: rows[-1].get(name) for name in ("loss", "images_per_s", "data_wait_percent")} if rows else {},
        "figures": {**rows[-1].get("logs", {}), **rows[-1].get("figures", {})} if rows else {},
    }
    run.folder.clean()
    write_state(run, value)
    _write_record(run, key, bundle, value)
    if run.config.has_report:
        from eagleray.flows.training_report import write_report

        write_report(run, value)
    return summary(value)


def summary(value: Mapping[str, Any]) -> dict[str, Any]:
    """What a verb prints of a run."""
    page = Path(value["run_dir"]) / "report.html"
    keep = ("step", "images", "seconds", "last", "figures", "validation", "evaluation", "where", "starts")
    return {
        "bundle": value["bundle"]["path"],
        "digest": value["bundle"]["digest"],
        "run": value["run_dir"],
        **{name: value[name] for name in keep if name in value},
        "report": str(page) if page.exists() else "",
    }


def write_bundle(
    run: Run, key: Mapping[str, Any], index: CorpusIndex, made: Made, *, like: ModelBundle | None = None
) -> ModelBundle:
    """Saves the model as the run's bundle, at ``out``, with a probe set.

    Args:
        run: The run.
        key: What makes it this one.
        index: Of what it was trained on.
        made: The model.
        like: A bundle whose ONNX may differ in some weights only, if there is one.
    """
    from eagleray.infer.parity import prove

    lineage = {
        **made.lineage,
        "corpus_digest": index.corpus_digest,
        "config_digest": config_digest(run.config),
        "run_key": digest_json(dict(key)),
        "seed": run.config.seed,
        "versions": versions(),
        "trained_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    config = run.config
    images = probe_images(index, made.spec) if config.probe_images == "corpus" else None
    return save_made(config.out, made, lineage, probes=lambda bundle: prove(bundle, images), like=like)


def probe_images(index: CorpusIndex, spec: ImageSpec) -> Uint8 | None:
    """Sixteen images of a corpus as the model sees them, drawn by their ids; None where none can be decoded.

    Returns:
        uint8, shape (N, H, W, 3), N <= 16.
    """
    import numpy as np

    from eagleray.infer.probes import NUM_PROBES
    from eagleray.vision.images import ImageRefused, decode
    from eagleray.vision.shard_images import ShardImages

    found = []
    with ShardImages(index.root) as images:
        for position in np.argsort(index.keys, kind="stable"):  # an id is a digest: the order is as good as drawn
            try:
                found.append(decode(images.read(index.shards[index.shard[position]], int(index.row[position])), spec))
            except ImageRefused:
                continue
            if len(found) == NUM_PROBES:
                break
    return np.stack(found) if found else None


def save_made(
    path: str | Path,
    made: Made,
    lineage: Mapping[str, Any],
    *,
    has_onnx: bool = True,
    probes: Prove | None = None,
    like: ModelBundle | None = None,
) -> ModelBundle:
    """Saves a model as a bundle: with its ONNX unless only torch will run it, with a probe set unless none will ask."""
    from eagleray.infer.export import export_onnx, reweigh
    from eagleray.vision import backbones
    from eagleray.vision.state_dicts import to_safetensors

    draft = ModelBundle(
        architecture=backbones.architecture_of(made.model),
        labels=made.labels,
        image_spec=made.spec,
        output=made.output,  # type: ignore[arg-type]
        embedding_dim=backbones.embedding_width(made.model, made.spec),
        model_args=backbones.saved_args(made.model),
        lineage=dict(lineage),
    )
    weights: dict[str, bytes | Path] = {SAFETENSORS: to_safetensors(made.model, str(path))}
    if has_onnx:
        found = None if like is None else reweigh(like, made.model, draft)
        weights[ONNX] = export_onnx(made.model, draft) if found is None else found
    hub_config = backbones.hub_config(made.model, made.spec, made.labels)
    return save_bundle(path, draft, weights, timm_config=hub_config, probes=probes)


def _head(run: Run, work: Work) -> dict[str, Any]:
    return {**head(run, work.key), "images": len(work.index), "corpus_digest": work.index.corpus_digest}


def head(run: Run, key: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json says of any run."""
    return {
        "schema": SCHEMA,
        "kind": run.kind,
        "command": ["eagleray", *sys.argv[1:]] if len(sys.argv) > 1 else [],
        "command_line": command_line(),
        "config": run.config.model_dump(mode="json"),
        "config_digest": config_digest(run.config),
        "key": dict(key),
        "run_key": digest_json(dict(key)),
        "run_dir": str(run.folder.root),
        "versions": versions(),
        "started_at": datetime.fromtimestamp(run.started, UTC).isoformat(timespec="seconds"),
    }


def _write_record(run: Run, key: Mapping[str, Any], bundle: ModelBundle, value: Mapping[str, Any]) -> None:
    subjects = {f"bundle/{name}": digest for name, digest in bundle.files.items()}
    subjects["bundle/bundle.json"] = storage.sha256_file(bundle.path / "bundle.json")
    if run.folder.metrics.exists():
        subjects["metrics.jsonl"] = storage.sha256_file(run.folder.metrics)
    inputs = {"corpus": value["corpus_digest"], "images": key["images"]}
    parent = bundle.lineage.get("parent", {})
    for name in ("model_digest", "source_sha256"):
        if parent.get(name):
            inputs["parent"] = parent[name]
    if "teacher" in bundle.lineage:
        inputs["teacher"] = bundle.lineage["teacher"]["model_digest"]
    keep = ("config_digest", "run_key", "versions", "step", "starts", "started_at", "ended_at", "figures")
    predicate = {
        **{name: value[name] for name in keep if name in value},
        "model_digest": bundle.model_digest,
        "seed": run.config.seed,
        "eagleray": __version__,
    }
    record = Record(kind=run.kind, subjects=subjects, inputs=inputs, predicate=predicate)
    storage.write_json(run.folder.root / "record.json", record.to_json())
