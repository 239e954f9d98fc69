"""The Report of a scored archive: totals that balance, what was seen, how surely, what was refused, what ran where.

It reads what the final manifest lists and nothing else: the parts, counted again row by row, and ``run.json``. The same
folder always gives the same report. Pictures are not opened here: a tile names its uri, ``pages.sheets`` fills it.

Example:
    >>> report = score_report("runs/archive")
    >>> report.verdict.text
    '2,013 images in = 2,012 scored + 1 quarantined'
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from eagleray.assure import report as blocks
from eagleray.assure.archive_tally import NO_REASON, SCORE_BINS, SHEET_TILES, Row, Tally, count_rows
from eagleray.assure.phrases import clock, count, duration, figure, file_name, last_name, plain, share
from eagleray.assure.report import Report
from eagleray.core.commits import read_manifest
from eagleray.core.storage import read_json

TOP_CLASSES = 30
RATE_POINTS = 60  # of the throughput line: enough for a curve, few enough for a light page
MIN_SAMPLES = 5  # of distinct moments: with fewer, a line would be mostly guessed
UNSAFE_REASON = "poison"  # such a file has killed or hung a process: nothing opens it again

REASONS = {
    "empty": "the file has no bytes",
    "not_image": "the bytes are no image format that is read here",
    "format_refused": "an image format that is not on the list of those allowed",
    "too_large": "more pixels or bytes than the limits allow",
    "truncated": "the file ends before the picture does",
    "corrupt": "the picture's data is damaged",
    "unreadable": "the storage did not give the bytes",
    "poison": "decoding it crashed, hung or ran out of memory",
}


def score_report(folder: str | Path) -> Report:
    """The report of a finished run.

    Args:
        folder: The ``--out`` folder of ``eagleray score``.

    Raises:
        DataError: The run is not finished.
        ArtifactError: The manifest or a part that it lists does not hold.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    run = _read_run(folder)
    tally = count_rows(folder)
    found = (
        _equation(manifest, run, tally),
        _figures(run, tally),
        *_charts(run, tally),
        *_sheets(tally),
        *_what_ran(run),
        *_repeat(folder, run),
        _digests(manifest, run),
    )
    return Report(
        title=f"Scores of {_source_name(run) or folder.resolve().name}",
        subtitle=_subtitle(run),
        created=str(run.get("ended_at") or datetime.now(UTC).isoformat(timespec="seconds")),
        verdict=_verdict(manifest, tally),
        blocks=tuple(block for block in found if block is not None),
    )


def _read_run(folder: Path) -> Mapping[str, Any]:
    """run.json, or nothing: a page without it is poorer, not wrong."""
    try:
        run = read_json(folder / "run.json")
    except (FileNotFoundError, ValueError):
        return {}
    return run if isinstance(run, dict) else {}


def _verdict(manifest: Mapping[str, Any], tally: Tally) -> blocks.Verdict:
    images_in, scored, quarantined = (int(manifest.get(key, 0)) for key in ("images_in", "scored", "quarantined"))
    equation = f"{count(images_in, 'image')} in = {scored:,} scored + {quarantined:,} quarantined"
    if images_in != scored + quarantined:
        gap = images_in - scored - quarantined
        told = f"{gap:,} not accounted for" if gap > 0 else f"{-gap:,} too many"
        return blocks.Verdict(f"{equation.replace(' = ', ', but ')}: {told}", is_good=False)
    if (tally.scored, tally.quarantined) != (scored, quarantined):
        held = f"the parts hold {tally.scored:,} scored + {tally.quarantined:,} quarantined"
        return blocks.Verdict(f"{equation} by the manifest, but {held}", is_good=False)
    return blocks.Verdict(equation, is_good=True)


def _equation(manifest: Mapping[str, Any], run: Mapping[str, Any], tally: Tally) -> blocks.Totals:
    images_in, scored, quarantined = (int(manifest.get(key, 0)) for key in ("images_in", "scored", "quarantined"))
    is_balanced = images_in == scored + quarantined
    reasons = ", ".join(f"{number:,}\u00a0{reason}" for reason, number in _ranked(tally.reasons)[:3])
    parts = count(len(manifest["parts"]), "part")
    copies = scored - int(run.get("inferred", scored))
    held = count(copies, "exact duplicate") if copies > 0 else ""
    return blocks.Totals(
        (
            blocks.Total("images in", images_in, held),
            blocks.Total("scored", scored, share(scored, images_in), tone="good"),
            blocks.Total("quarantined", quarantined, reasons or "nothing refused", tone="warn" if quarantined else ""),
        ),
        operators=("=" if is_balanced else "≠", "+"),
        note=f"Counted again for this page: {tally.scored + tally.quarantined:,} rows in {parts}.",
    )


def _figures(run: Mapping[str, Any], tally: Tally) -> blocks.Totals | None:
    items = []
    if run.get("images_per_s"):
        steady = run.get("images_per_s_steady")
        note = f"{figure(steady)} without start and end" if steady else ""
        items.append(blocks.Total("images per second", figure(run["images_per_s"]), note))
    if run.get("seconds") is not None:
        items.append(blocks.Total("elapsed", duration(float(run["seconds"]))))
    if tally.mean_score is not None:
        items.append(blocks.Total("classes seen", len(tally.labels)))
        items.append(blocks.Total("mean score", f"{tally.mean_score:.3f}"))
    return blocks.Totals(tuple(items)) if items else None


def _charts(run: Mapping[str, Any], tally: Tally) -> Iterator[blocks.Block]:
    if tally.scored:
        yield _classes(tally)
    if tally.mean_score is not None:
        odd = f" {count(tally.odd, 'score')} not finite, left out." if tally.odd else ""
        yield blocks.Histogram(
            "How sure the model was",
            edges=tuple(index / SCORE_BINS for index in range(SCORE_BINS + 1)),
            counts=tuple(int(number) for number in tally.histogram),
            x_label="score of the first label",
            y_label="images",
            note="The probability that the model gives its first label: not a measured accuracy." + odd,
        )
    if tally.decisions:
        chosen = tuple(
            blocks.Bar(tally.names.get(key, key), number, key) for key, number in _ranked(tally.decisions)[:10]
        )
        yield blocks.Bars(
            "Decisions", chosen, unit="images", whole=float(tally.scored), note="The bundle's thresholds, applied."
        )
    if line := _throughput(run):
        yield line


def _classes(tally: Tally) -> blocks.Bars:
    ranked = _ranked(tally.labels)
    shown, rest = ranked[:TOP_CLASSES], ranked[TOP_CLASSES:]
    note = f"First label of each image, {count(len(ranked), 'class', 'classes')}."
    if rest:
        held = count(sum(number for _, number in rest), "image")
        note = (
            f"First label of each image: the {len(shown)} largest of {len(ranked):,} classes; the others hold {held}."
        )
    bars = tuple(
        blocks.Bar(tally.names[label] or "(no label)", number, label if label != tally.names[label] else "")
        for label, number in shown
    )
    return blocks.Bars("What was seen", bars, unit="images", whole=float(tally.scored), note=note)


def _throughput(run: Mapping[str, Any]) -> blocks.Line | None:
    """Images per second over the run, from samples of (seconds, images done)."""
    samples = sorted(
        (float(s["t_s"]), float(s["done"])) for s in run.get("progress") or () if {"t_s", "done"} <= set(s)
    )
    done_now = sum(int(worker.get("images") or 0) for worker in run.get("workers") or ())
    if samples and samples[0][0] > 0 and 0 < done_now <= samples[-1][1]:
        samples.insert(0, (0.0, samples[-1][1] - done_now))  # a resumed run starts above zero
    if len({t_s for t_s, _ in samples}) < MIN_SAMPLES:
        return None
    time_s, done = np.array(samples).T
    edges = np.linspace(time_s[0], time_s[-1], min(RATE_POINTS, max(2, len(samples) // 2)) + 1)
    at_edge = np.interp(edges, time_s, np.maximum.accumulate(done))
    rate = np.diff(at_edge) / np.diff(edges)
    at = np.concatenate([edges[:1], (edges[1:] + edges[:-1]) / 2, edges[-1:]])
    level = np.concatenate([rate[:1], rate, rate[-1:]])
    mean = (at_edge[-1] - at_edge[0]) / (edges[-1] - edges[0])
    return blocks.Line(
        "Throughput",
        points=tuple((round(float(x), 3), round(float(y), 3)) for x, y in zip(at, level, strict=True)),
        x_label="time since the start",
        y_label="images per second",
        x_unit="s",
        reference=round(float(mean), 3),
        reference_label=f"mean {figure(float(mean))}",
    )


def _sheets(tally: Tally) -> Iterator[blocks.Block]:
    if tally.most.rows:
        note = "Highest scores of the first label; exact duplicates are shown once."
        yield blocks.Sheet("Most sure", tuple(_scored_tile(row) for row in tally.most.rows), note)
    shown = {row.id or row.uri for row in tally.most.rows}  # of a small archive, no image is on both sheets
    least = tuple(_scored_tile(row) for row in tally.least.rows if (row.id or row.uri) not in shown)
    if least:
        note = "Lowest scores of the first label: look here first for classes that the model does not know."
        yield blocks.Sheet("Least sure", least, note)
    if not tally.quarantined:
        return
    rows = tuple((reason, count, REASONS.get(reason, "")) for reason, count in _ranked(tally.reasons))
    yield blocks.Table("Quarantined", ("reason", "images", "meaning"), rows, code_columns=(0,))
    queues = [list(tally.refused[reason]) for reason, _ in _ranked(tally.reasons)]
    chosen = [queue[turn] for turn in range(SHEET_TILES) for queue in queues if turn < len(queue)][:SHEET_TILES]
    note = "" if len(chosen) == tally.quarantined else f"{len(chosen)} of {tally.quarantined:,}, reasons in turn."
    yield blocks.Sheet("", tuple(_refused_tile(row) for row in chosen), note)


def _scored_tile(row: Row) -> blocks.Tile:
    label = row.label_name or row.label or "(no label)"
    return blocks.Tile(row.uri, (label,), file_name(row.uri), tag=f"{row.score:.3f}")


def _refused_tile(row: Row) -> blocks.Tile:
    detail = row.detail or REASONS.get(row.reason, "")
    is_unsafe = row.reason == UNSAFE_REASON
    return blocks.Tile(row.uri, (detail,), file_name(row.uri), tag=row.reason or NO_REASON, is_unsafe=is_unsafe)


def _what_ran(run: Mapping[str, Any]) -> Iterator[blocks.Block]:
    where, runtime, model = (_group(run, key) for key in ("where", "runtime", "model"))
    facts = {
        "Where": where.get("mode"),
        "Nodes": plain(where.get("nodes")),
        "CPUs": where.get("cpus"),
        "GPUs": where.get("gpus") or None,
        "Workers": where.get("workers"),
        "Runtime": " ".join(
            str(runtime[key]) for key in ("name", "version", "precision", "device") if runtime.get(key)
        ),
        "Model": model.get("architecture"),
        "Started": clock(run.get("started_at")),
        "Ended": clock(run.get("ended_at")),
        "Elapsed": duration(float(run["seconds"])) if run.get("seconds") is not None else None,
        "CPU time": duration(float(run["cpu_s"])) if run.get("cpu_s") else None,
        "GPU time": duration(float(run["gpu_s"])) if run.get("gpu_s") else None,
    }
    known = tuple((name, str(value)) for name, value in facts.items() if value not in (None, ""))
    if known:
        yield blocks.Table("What ran where", ("", ""), known)
    workers = [worker for worker in run.get("workers") or () if isinstance(worker, dict)]
    if workers:
        rows = tuple(_worker_row(worker) for worker in workers)
        yield blocks.Table(
            "Workers", ("process", "node", "images", "seconds", "images/s"), rows, is_folded=len(rows) > 8
        )
    for title, key in (("Versions", "versions"), ("Configuration", "config")):
        group = _group(run, key)
        if group:
            rows = tuple((str(name), plain(value)) for name, value in sorted(group.items()) if value is not None)
            yield blocks.Table(title, ("", ""), rows, code_columns=(1,), is_folded=True)


def _worker_row(worker: Mapping[str, Any]) -> tuple[blocks.Cell, ...]:
    images, seconds = int(worker.get("images") or 0), float(worker.get("seconds") or 0.0)
    node = str(worker.get("node") or "")
    return (
        str(worker.get("pid", "")),
        node,
        images,
        round(seconds, 1),
        round(images / seconds, 1) if seconds else None,
    )


def _repeat(folder: Path, run: Mapping[str, Any]) -> Iterator[blocks.Block]:
    if run.get("command"):
        note = "The same command on this folder does only what is missing; on a finished run, new or changed files."
        yield blocks.Code("How to repeat it", shlex.join(str(word) for word in run["command"]), note)
    lines = (
        "import eagleray",
        f"scores = eagleray.open_scores({str(folder.resolve())!r})  # a pyarrow Dataset",
        'scores.to_table(columns=["uri", "label_name", "score"])',
    )
    yield blocks.Code("How to read the scores", "\n".join(lines), "Exactly the parts that the manifest lists.")


def _digests(manifest: Mapping[str, Any], run: Mapping[str, Any]) -> blocks.Table | None:
    source = _group(run, "source")
    named = {
        "model": manifest.get("model_digest") or _group(run, "model").get("digest"),
        "preprocessing": run.get("image_spec_digest"),
        "configuration": run.get("config_digest"),
        "input": source.get("digest") or run.get("input_digest"),
    }
    rows = tuple((name, str(value)) for name, value in named.items() if value)
    note = "SHA-256: the same digest is the same model, preprocessing, settings or input."
    return blocks.Table("Digests", ("", ""), rows, note, code_columns=(1,)) if rows else None


def _ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    """Largest first, equal counts by name: the same on every reading."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _group(run: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = run.get(key)
    return value if isinstance(value, dict) else {}


def _source_name(run: Mapping[str, Any]) -> str:
    source = _group(run, "source").get("path") or _group(run, "config").get("source")
    return last_name(source) if isinstance(source, str) else ""


def _subtitle(run: Mapping[str, Any]) -> str:
    model = _group(run, "model")
    path, architecture = last_name(str(model.get("path") or "")), str(model.get("architecture") or "")
    name = f"{path} ({architecture})" if path and architecture and path != architecture else path or architecture
    return f"by the model {name}" if name else ""
