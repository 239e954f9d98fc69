"""The page of a training run: how the loss fell, how fast it went, what the probes saw, what it is worth, whence it is.

Example:
    >>> write_report(run, run.folder.read_run())
    PosixPath('bundles/trash.run/report.html')
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eagleray.assure import report as blocks
from eagleray.assure.phrases import count, last_name
from eagleray.assure.report import Report
from eagleray.core import storage
from eagleray.core.progress import duration
from eagleray.flows.finetune_start import FinetuneConfig, select
from eagleray.flows.report import EVALUATION, SCORING, STORED, read_report, write_with_pictures
from eagleray.flows.run_folder import read_lines
from eagleray.flows.training_data import Chosen, choose
from eagleray.flows.training_run import Run

MOST_POINTS = 400  # of a curve: more cannot be seen
MOST_CLASSES = 40
FIGURES = {  # what probes, detectors and tasks log, in words
    "knn_top1": "k nearest neighbours, share right",
    "linear_top1": "linear probe, share right",
    "accuracy": "share right on training images",
    "teacher_agreement": "share of images on which student and teacher agree",
    "val_accuracy": "share right on validation images",
    "spread": "spread of features",
    "projection_spread": "spread of projections",
    "effective_rank": "effective rank of features",
    "teacher_entropy": "entropy of the teacher, nats",
    "teacher_marginal_entropy": "entropy of the teacher's mean, nats",
    "teacher_student_kl": "KL of teacher and student, nats",
}
PROBES, COLLAPSE = ("knn_top1", "linear_top1"), ("spread", "projection_spread")
SHARES = (*PROBES, "accuracy", "val_accuracy")
TITLES = ("Metrics", "Confusion", "Most confidently wrong", "Most frequent confusions", "Reliability", "Classes")


def write_report(run: Run, value: Mapping[str, Any]) -> Path:
    """Writes report.json and report.html.

    Args:
        run: The run.
        value: Its run.json.

    Raises:
        StorageError: The page cannot be written.
    """
    root = run.folder.root
    config = run.config
    chosen = select(config)[0] if isinstance(config, FinetuneConfig) else choose(config)
    report = training_report(value, read_lines(run.folder.metrics), chosen, read_evaluation(root))
    storage.write_json(root / STORED, report.to_json())
    return write_with_pictures(root, report, root / EVALUATION / SCORING / "input")


def read_evaluation(root: Path) -> Report | None:
    """The report of the evaluation that belongs to a run."""
    path = root / EVALUATION / STORED
    return read_report(path) if path.exists() else None


def training_report(
    value: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], chosen: Chosen, evaluation: Report | None
) -> Report:
    """The Report.

    Args:
        value: run.json.
        rows: metrics.jsonl.
        chosen: The images.
        evaluation: Of the result; None where no split is held out.
    """
    corpus = last_name(str(chosen.corpus.path))
    config = value["config"]
    what = f"{config['method']} of {config['backbone']}" if value["kind"] == "pretrain" else f"{config['parent']}"
    return Report(
        title=f"{value['kind'].capitalize()} on {corpus}",
        subtitle=what if value["kind"] == "pretrain" else f"mode {config['mode']}, from {last_name(what)}",
        created=value["ended_at"],
        verdict=blocks.Verdict(_verdict(value, evaluation)),
        blocks=tuple(_blocks(value, rows, chosen, evaluation)),
    )


def _verdict(value: Mapping[str, Any], evaluation: Report | None) -> str:
    if evaluation is not None and evaluation.verdict is not None:
        return evaluation.verdict.text
    loss, figures = value["last"].get("loss"), value["figures"]
    parts = [f"{value['step']:,} steps on {count(value['images'], 'image')}"]
    parts += [f"loss {loss:.4g}"] if loss is not None else []
    parts += [f"nearest neighbours {figures['knn_top1']:.3f} right"] if "knn_top1" in figures else []
    return ", ".join(parts)


def _blocks(
    value: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], chosen: Chosen, evaluation: Report | None
) -> Iterator[blocks.Block]:
    yield _totals(value)
    yield from _curves(rows)
    if evaluation is not None:
        kept = [block for block in evaluation.blocks if getattr(block, "title", "") in TITLES]
        yield from kept
    yield from _classes(chosen)
    yield _facts(value, chosen)
    yield from _starts(value)
    yield blocks.Code("How to repeat it", value["command_line"], "The same command on this folder does nothing new.")
    digests = {"bundle": value["bundle"]["digest"], "corpus": value["corpus_digest"], "run": value["run_key"]}
    note = "SHA-256: the same digest is the same thing."
    yield blocks.Table("Digests", ("", ""), tuple(digests.items()), note, (1,))


def _totals(value: Mapping[str, Any]) -> blocks.Totals:
    last, where = value["last"], value.get("where", {})
    items = [
        blocks.Total("images", value["images"]),
        *([blocks.Total("steps", value["step"])] if value["step"] else []),
        blocks.Total("time", duration(value["seconds"]), f"{where.get('workers', 1)} workers, {where.get('mode', '')}"),
    ]
    if last.get("loss") is not None:
        items.append(blocks.Total("loss", f"{last['loss']:.4g}", "of the last stretch"))
    if last.get("images_per_s") is not None:
        wait = f"data wait {last['data_wait_percent']:.0f} %"
        items.append(blocks.Total("images/s", f"{last['images_per_s']:,.0f}", wait))
    for name in ("knn_top1", "linear_top1"):
        if name in value["figures"]:
            items.append(blocks.Total(name.replace("_top1", " probe"), f"{value['figures'][name]:.3f}", "share right"))
    return blocks.Totals(tuple(items))


def _curves(rows: Sequence[Mapping[str, Any]]) -> Iterator[blocks.Block]:
    """The lines over steps: loss, learning rate, speed, probes, measures of collapse."""
    for key, title, axis in (
        ("loss", "Loss", "loss"),
        ("lr", "Learning rate", "learning rate"),
        ("images_per_s", "Speed", "images/s"),
    ):
        points = _points(rows, lambda row, key=key: row.get(key))  # type: ignore[misc]
        if len(points) > 1:
            yield blocks.Curves(title, (blocks.Curve(axis, points),), "optimizer step", axis)
    told = {name for row in rows for group in ("figures", "logs") for name in row.get(group, {})}
    for title, names in (("Share of images right", SHARES), ("Collapse: spread", COLLAPSE)):
        yield from _together(rows, title, [name for name in names if name in told])
    for name in sorted(told - {*SHARES, *COLLAPSE, "momentum"}):
        yield from _together(rows, FIGURES.get(name, name), [name])


def _together(rows: Sequence[Mapping[str, Any]], title: str, names: Sequence[str]) -> Iterator[blocks.Block]:
    curves = tuple(
        blocks.Curve(FIGURES.get(name, name), points)
        for name in names
        if len(points := _points(rows, lambda row, name=name: _figure(row, name))) > 1  # type: ignore[misc]
    )
    if curves:
        yield blocks.Curves(title, curves, "optimizer step", "value" if len(curves) > 1 else curves[0].label)


def _figure(row: Mapping[str, Any], name: str) -> float | None:
    return row.get("figures", {}).get(name, row.get("logs", {}).get(name))  # type: ignore[no-any-return]


def _points(rows: Sequence[Mapping[str, Any]], value: Any) -> tuple[tuple[float, float], ...]:
    found = sorted({row["step"]: value(row) for row in rows if value(row) is not None}.items())
    every = max(1, -(-len(found) // MOST_POINTS))
    return tuple((float(step), float(y)) for step, y in found[::every])


def _classes(chosen: Chosen) -> Iterator[blocks.Block]:
    names = list(chosen.splits.names)
    labels = sorted({label for counts in chosen.counts.values() for label in counts})
    if not labels:
        return
    rows: tuple[tuple[blocks.Cell, ...], ...] = tuple(
        (label, *(chosen.counts[name].get(label, 0) for name in names)) for label in labels
    )
    note = f"Trained on {chosen.split!r}; by {chosen.splits.how}."
    yield blocks.Table("Images of each class", ("class", *names), rows, note, is_folded=len(rows) > MOST_CLASSES)


def _facts(value: Mapping[str, Any], chosen: Chosen) -> blocks.Table:
    config, where = value["config"], value.get("where", {})
    facts = {
        "Corpus": str(chosen.corpus.path),
        "Split": f"{chosen.split}: {count(value['images'], 'image')}",
        "Bundle": value["bundle"]["path"],
        **_validation(value, chosen),
        **_how(value),
        "Seed": str(config["seed"]),
        "Ran on": f"{where.get('mode', '')}, {where.get('cpus', 0):g} cores, {where.get('gpus', 0):g} GPUs",
    }
    return blocks.Table("What was run", ("", ""), tuple(facts.items()))


def _validation(value: Mapping[str, Any], chosen: Chosen) -> dict[str, str]:
    """On what accuracy was measured while the run went on, and which weights were kept."""
    kept = value.get("validation")
    if not kept:
        return {}
    share = f", {kept['val_accuracy']:.3f} right" if "val_accuracy" in kept else ""
    return {
        "Validated on": f"{chosen.validated_on}: {count(kept['images'], 'image')}",
        "Weights kept": f"the {kept['keep']}, of step {kept['step']:,}{share}",
    }


def _how(value: Mapping[str, Any]) -> dict[str, str]:
    """How the weights were found: by steps, or a head solved on features."""
    config, fit = value["config"], value.get("fit", {})
    facts = {}
    if fit:
        images, width = fit["features"]
        facts["Features"] = f"{images:,} x {width:,}, of the frozen backbone, by the scoring path"
    if fit.get("c") is not None:
        tried = ", ".join(f"{c}: {score:.3f}" for c, score in fit["cross_validated"].items())
        facts["Head"] = f"logistic regression, C {fit['c']:g}, in {fit['fit_s']:.1f} s"
        return {**facts, **({"C, cross-validated": tried} if tried else {})}
    return {
        **facts,
        "Batch": f"{config['batch_size']:,} images a step, accumulation {config['accumulation']}",
        "Optimizer": f"{config['optimizer']}, lr {config['lr']:g} for {config['base_batch'] or 'any batch'}, "
        f"weight decay {config['weight_decay']:g}",
        "Precision": config["precision"],
    }


def _starts(value: Mapping[str, Any]) -> Iterator[blocks.Block]:
    rows = read_lines(Path(value["run_dir"]) / "starts.jsonl")
    if len(rows) > 1:
        cells = tuple((row["attempt"], row["step"], row["world_size"], row.get("node", "")) for row in rows)
        note = "Each time that workers began: first, and after a stop, a failure or a resize."
        yield blocks.Table("Starts", ("entry", "from step", "workers", "node"), cells, note)
