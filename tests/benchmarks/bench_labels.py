"""Few labels: top-1 on a set's own test split by the share of its training labels, pretrained against random weights.

Each point is `eagleray finetune` of EfficientNet-Lite0 as anybody runs it, on a corpus whose training split keeps a
share of each class (one image at least; another draw each seed) and whose test split is whole. ``head`` solves the last
layer on features at the model's own size; ``full`` trains everything at a small size for the same number of steps at
every share, so that a smaller share is seen more often and not less. Prints a table and writes the curves as a page;
runs are kept under CACHE/labels: the same command again does only what is missing.

Example:
    python tests/benchmarks/bench_labels.py --modes head                              # 18 runs, some 10 minutes
    python tests/benchmarks/bench_labels.py --modes full --seeds 1 --steps 60
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import learning_data
import numpy as np
from bench_score import describe_machine
from checkout import EAGLERAY, make_importable
from contestants import metered

MODES = ("head", "full")
STARTS = {"published weights": ("lite0", True), "random weights": ("tf_efficientnet_lite0", False)}
SHARES = (0.01, 0.1, 1.0)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", default="trashnet", help=f"any of {', '.join(learning_data.SETS)} with a split")
    parser.add_argument("--modes", default=",".join(MODES), help=f"any of {', '.join(MODES)}")
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="of the training labels")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size-px", type=int, default=96, help="of full")
    parser.add_argument("--steps", type=int, default=160, help="of full")
    parser.add_argument("--batch", type=int, default=32, help="of full, less where there are fewer images")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/eagleray-bench"))
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, help="default CACHE/bench_labels.json")
    args = parser.parse_args(argv)
    args.sets, args.modes = tuple(args.sets.split(",")), tuple(args.modes.split(","))
    args.shares = tuple(float(share) for share in args.shares.split(","))
    unknown = set(args.modes) - set(MODES) | set(args.sets) - set(learning_data.SETS)
    if unknown:
        parser.error(f"unknown {', '.join(sorted(unknown))}")
    args.rounds = args.seeds  # what describe_machine prints
    return args


def settings(args: argparse.Namespace, mode: str, seed: int) -> dict[str, Any]:
    """What a run is told besides its corpus and its start."""
    fixed = {"mode": mode, "split": "train", "judge": "test", "seed": seed, "allow_missing": True, "has_report": False}
    if mode == "head":
        return fixed
    steps = {"size_px": args.size_px, "max_steps": args.steps, "batch_size": args.batch, "lr": 2e-3}
    return {**fixed, **steps, "warmup_epochs": 0.0, "report_every_s": 10.0}


def finetuned(args: argparse.Namespace, name: str, mode: str, start: str, share: float, seed: int) -> dict[str, Any]:
    """One run: its images and its figures on the test split; kept by what it was told."""
    parent, is_pretrained = STARTS[start]
    told = {**settings(args, mode, seed), "is_pretrained": is_pretrained}
    about = [f"{told[key]:g}" for key in ("size_px", "max_steps", "batch_size", "lr") if key in told]
    stem = "-".join([name, f"{share:g}", mode, parent, *about, f"seed{seed}"])
    kept = args.cache / "labels" / f"{stem}.json"
    if not kept.is_file():
        corpus = learning_data.few_labels(args.cache, name, share, seed)
        out = args.cache / "labels-runs" / kept.stem
        for path in (out, Path(f"{out}.run")):
            shutil.rmtree(path, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [*EAGLERAY, "finetune", "--corpus", str(corpus), "--from", parent, "--out", str(out)]
        for key, value in told.items():
            command += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
        _, cost = metered(command, out.with_suffix(".log"))
        run = json.loads((Path(f"{out}.run") / "run.json").read_bytes())
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({**run["evaluation"], "images": run["images"], "seconds": cost.seconds}))
        shutil.rmtree(f"{out}.run", ignore_errors=True)
    found: dict[str, Any] = json.loads(kept.read_bytes())
    print(f"#   {kept.stem}: {found['top1']['value']:.3f} of {found['n']}, {found['seconds']:.0f} s", flush=True)
    return found


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each set, mode, start and share: top-1 by seed."""
    rows = []
    for name in args.sets:
        for mode in args.modes:
            for start in STARTS:
                for share in args.shares:
                    runs = [finetuned(args, name, mode, start, share, seed) for seed in range(1, args.seeds + 1)]
                    figures = {key: [run[key]["value"] for run in runs] for key in ("top1", "balanced_accuracy")}
                    about = {"set": name, "mode": mode, "start": start, "share": share, "images": runs[0]["images"]}
                    rows.append({**about, **figures, "seconds": [run["seconds"] for run in runs]})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown, the two starts beside each other."""
    lines = [
        "",
        "| set, mode | labels | images | published weights, top-1 (range) | balanced | random weights, top-1 (range)"
        " | balanced | gain, points | seconds a run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in rows if row["start"] == "published weights"):
        keys = ("set", "mode", "share")
        other = next(one for one in rows if one["start"] != row["start"] and all(one[key] == row[key] for key in keys))
        gains = [100 * (mine - theirs) for mine, theirs in zip(row["top1"], other["top1"], strict=True)]
        cells = [
            f"{row['set']}, {row['mode']}",
            f"{row['share']:.0%}",
            f"{row['images']:,}",
            *(
                cell
                for one in (row, other)
                for cell in (_spread(one["top1"]), f"{_mean(one['balanced_accuracy']):.3f}")
            ),
            f"{_mean(gains):+.1f} ({min(gains):+.1f} to {max(gains):+.1f})",
            f"{statistics.median(row['seconds'] + other['seconds']):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values)


def _spread(values: Sequence[float]) -> str:
    return f"{_mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def plot(rows: Sequence[dict[str, Any]], folder: Path) -> Path:
    """The curves as a page."""
    make_importable()
    from eagleray.assure.charts import Curve, Curves
    from eagleray.assure.report import Report
    from eagleray.pages.page import write_page

    blocks = []
    for name, mode in dict.fromkeys((row["set"], row["mode"]) for row in rows):
        mine = [row for row in rows if (row["set"], row["mode"]) == (name, mode)]
        curves = tuple(
            Curve(
                start,
                tuple((float(np.log10(row["images"])), _mean(row["top1"])) for row in mine if row["start"] == start),
            )
            for start in STARTS
        )
        title = f"{name}, {mode}: top-1 by labels"
        blocks.append(Curves(title, curves, "log10 of labelled images", "top-1", has_marks=True))
    folder.mkdir(exist_ok=True)
    return write_page(folder, Report("Few labels", datetime.now(UTC).isoformat(timespec="seconds"), tuple(blocks)))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what was asked, prints the table, writes the page."""
    args = parse(argv)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    args.cache.mkdir(parents=True, exist_ok=True)
    began, target = time.time(), args.json or args.cache / "bench_labels.json"
    packages = {name: metadata.version(name) for name in ("torch", "timm")}
    machine = {**describe_machine(args), **packages}
    print("\n".join(f"# {name}: {value}" for name, value in machine.items()), flush=True)
    rows = measure(args)
    print(table(rows))
    print(f"\n# the curves: {plot(rows, args.cache / 'few-labels')}")
    minutes = round((time.time() - began) / 60, 1)
    target.write_text(json.dumps({"machine": machine, "labels": rows, "minutes": minutes}, indent=1) + "\n")
    print(f"# {minutes} minutes; every figure in {target}")
    shutil.rmtree(args.cache / "labels-runs", ignore_errors=True)


if __name__ == "__main__":
    main()
