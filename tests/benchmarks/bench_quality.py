"""What is learnt, on real images: self-supervised features by kNN, fine-tuning, and few labels.

selfsup: leave-one-out weighted kNN (k 20, tau 0.07) of `eagleray pretrain` beside lightly's reference loop at equal
steps, and beside the backbone before its first step; seeds, first weights and images are the same on both sides.
Differences are paired, over seeds and images, with a 95 % interval that draws both anew. finetune: EfficientNet-Lite0
on a set's own split, from its published weights and from none. few: a head on 1, 10 and 100 % of the training labels.

Weights and figures are kept under CACHE/quality: the same command again does only what is missing.

Example:
    python tests/benchmarks/bench_quality.py --only selfsup --sets trashnet --methods simclr     # six runs
    python tests/benchmarks/bench_quality.py --steps 60 --seeds 1 --epochs 1 --shares 0.1,1      # minutes: a trial
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
from learning_data import Neighbours, Pictures, difference
from training_contestants import Ours, Peer

PARTS = ("selfsup", "finetune", "few")
SIZE_PX = {"trashnet": 64, "cifar": 32, "apple": 64}
PROBE = {"trashnet": (0.847, 0.791), "apple": (0.979, 0.982)}  # shared/data/README.md: accuracy, balanced accuracy
MARGIN, SIMCLR_GAIN = 1.0, 5.0  # points, issue 3


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help=f"any of {', '.join(PARTS)}")
    parser.add_argument("--sets", default="trashnet,cifar", help="of selfsup")
    parser.add_argument("--methods", default="simclr,byol,dino")
    parser.add_argument("--backbone", default="resnet10t")
    parser.add_argument("--size-px", type=int, default=None, help="default 64 for trashnet, 32 for cifar")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1_000, help="optimizer steps of a self-supervised run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--finetune-sets", default="trashnet", help="any of trashnet, apple")
    parser.add_argument("--epochs", type=int, default=8, help="of fine-tuning")
    parser.add_argument("--max-steps", type=int, default=None, help="of fine-tuning, below its epochs: for a trial")
    parser.add_argument("--shares", default="0.01,0.1,1", help="of the training labels")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/eagleray-bench"))
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, help="default CACHE/bench_quality.json")
    args = parser.parse_args(argv)
    for name in ("only", "sets", "methods", "finetune_sets"):
        setattr(args, name, tuple(getattr(args, name).split(",")))
    args.shares = tuple(float(share) for share in args.shares.split(","))
    unknown = set(args.only) - set(PARTS) | set(args.sets) - set(SIZE_PX) | set(args.finetune_sets) - set(PROBE)
    if unknown:
        parser.error(f"unknown {', '.join(sorted(unknown))}")
    args.rounds = args.seeds  # what describe_machine prints
    return args


def sides(args: argparse.Namespace, pictures: Pictures, method: str, work: Path) -> dict[str, Ours | Peer]:
    """The same run by `eagleray pretrain` and by lightly's loop."""
    size_px = args.size_px or SIZE_PX[pictures.name]
    words = ["pretrain", "--corpus", str(pictures.corpus), "--method", method, "--backbone", args.backbone]
    words += ["--size-px", str(size_px), "--batch-size", str(args.batch)]
    ours = Ours(work, "eagleray", words, {"max_steps": args.steps, "split": "all", "report_every_s": 10.0})
    options = {"folder": pictures.folder, "backbone": args.backbone, "size": size_px, "batch": args.batch}
    more = {"steps": args.steps, "method": method}
    peer = Peer(work, "lightly", "lightly_loop.py", {**options, **more}, ({"threads": 2},), keeps_weights=True)
    return {"eagleray": ours, "lightly": peer}


def trained(side: Ours | Peer, seed: int, kept: Path) -> dict[str, Any]:
    """Runs a side unless its weights are there; what the run took."""
    told = kept.with_suffix(".json")
    if not (kept.is_file() and told.is_file()):
        side.tune()
        trial = side.run(seed)
        assert trial.weights is not None  # both sides keep theirs
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(trial.weights, kept)
        told.write_text(json.dumps({"loss": trial.loss, **vars(trial.cost)}))
    found: dict[str, Any] = json.loads(told.read_bytes())
    return found


def selfsup(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each set and method."""
    rows = []
    for name in args.sets:
        pictures = learning_data.make(args.cache, name)
        size_px = args.size_px or SIZE_PX[name]
        knn = Neighbours(pictures.folder, size_px, args.backbone)
        seeds = range(1, args.seeds + 1)
        before = np.stack([knn.right(None, seed) for seed in seeds])
        for method in args.methods:
            work, right, runs = args.cache / "quality-runs", {}, {}
            work.mkdir(parents=True, exist_ok=True)
            stem = f"{name}-{pictures.num_images}-{args.backbone}-{size_px}px-{method}-b{args.batch}-s{args.steps}"
            for seed in seeds:
                for who, side in sides(args, pictures, method, work).items():
                    kept = args.cache / "quality" / f"{stem}-seed{seed}-{who}.safetensors"
                    runs[f"{who} {seed}"] = told = trained(side, seed, kept)
                    found = knn.right(kept)
                    right.setdefault(who, []).append(found)
                    was = f"kNN {100 * found.mean():.1f}, untrained {100 * before[seed - 1].mean():.1f}"
                    print(f"#   {stem} seed {seed} {who}: {was}, {told['seconds']:.0f} s", flush=True)
            shutil.rmtree(work, ignore_errors=True)
            ours, theirs = (np.stack(right[who]) for who in ("eagleray", "lightly"))
            rows.append(
                {
                    "set": name,
                    "method": method,
                    "what": f"{args.backbone}, {size_px} px, batch {args.batch}, {args.steps} steps",
                    "knn": {
                        who: [100 * float(one.mean()) for one in values]
                        for who, values in (("eagleray", ours), ("lightly", theirs), ("untrained", before))
                    },
                    "against_lightly": difference(ours, theirs),
                    "against_untrained": difference(ours, before),
                    "runs": runs,
                }
            )
    return rows


def selfsup_table(rows: Sequence[dict[str, Any]]) -> str:
    """kNN in Markdown."""
    lines = [
        "",
        "| set, method | run | eagleray (range) | lightly | untrained | - lightly, points (95 %) | goal"
        " | - untrained, points (95 %) | goal |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        (gain, low, high), (rise, least, most) = row["against_lightly"], row["against_untrained"]
        wanted = SIMCLR_GAIN if (row["method"], row["set"]) == ("simclr", "trashnet") else 0.0
        is_above = least > 0 and rise >= wanted
        ours = row["knn"]["eagleray"]
        cells = [
            f"{row['set']}, {row['method']}",
            row["what"],
            f"{statistics.mean(ours):.1f} ({min(ours):.1f} to {max(ours):.1f})",
            *(f"{statistics.mean(row['knn'][who]):.1f}" for who in ("lightly", "untrained")),
            f"{gain:+.2f} ({low:+.2f} to {high:+.2f})",
            f">= -{MARGIN:g}: {'met' if gain >= -MARGIN else 'NOT MET'}",
            f"{rise:+.2f} ({least:+.2f} to {most:+.2f})",
            f"> 0{f', >= {wanted:g}' if wanted else ''}: {'met' if is_above else 'NOT MET'}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def finetuned(args: argparse.Namespace, corpus: Path, mode: str, is_pretrained: bool, seed: int) -> dict[str, Any]:
    """One `eagleray finetune` of Lite0, judged on the test split; kept by what it was told."""
    parent = "lite0" if is_pretrained else "tf_efficientnet_lite0"
    settings = {"split": "train", "judge": "test", "seed": seed, "allow_missing": True, "has_report": False}
    if not is_pretrained:
        settings["is_pretrained"] = False
    if mode == "full":
        settings.update({"epochs": args.epochs, "batch_size": 32, "lr": 2e-3})
        settings.update({"max_steps": args.max_steps} if args.max_steps else {})
    about = "-".join(str(settings[name]) for name in ("epochs", "max_steps") if name in settings)
    kept = args.cache / "quality" / f"finetune-{corpus.name}-{mode}-{parent}-{about}-seed{seed}.json"
    if not kept.is_file():
        out = args.cache / "quality-runs" / kept.stem
        for path in (out, Path(f"{out}.run")):
            shutil.rmtree(path, ignore_errors=True)
        command = [*EAGLERAY, "finetune", "--corpus", str(corpus), "--from", parent, "--mode", mode, "--out", str(out)]
        for name, value in settings.items():
            command += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        _, cost = metered(command, out.with_suffix(".log"))
        told = json.loads((Path(f"{out}.run") / "run.json").read_bytes())
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({**told["evaluation"], "images": told["images"], "seconds": cost.seconds}))
    found: dict[str, Any] = json.loads(kept.read_bytes())
    top1 = found["top1"]
    print(f"#   {kept.stem}: {top1['value']:.3f} ({top1['low']:.3f} to {top1['high']:.3f})", flush=True)
    return found


def whole_corpus(args: argparse.Namespace, name: str) -> Path:
    """The set's own zip as a corpus, with its split and groups."""
    return learning_data.ingested(args.cache, learning_data.data_folder() / f"{learning_data.SETS[name][0]}.zip")


def finetune(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each set and start."""
    rows = []
    for name in args.finetune_sets:
        corpus = whole_corpus(args, name)
        for mode, is_pretrained in (("head", True), ("full", True), ("full", False)):
            found = finetuned(args, corpus, mode, is_pretrained, seed=1)
            start = "published weights" if is_pretrained else "random weights"
            rows.append({"set": name, "mode": mode, "start": start, **found})
    return rows


def finetune_table(rows: Sequence[dict[str, Any]]) -> str:
    """Fine-tuning in Markdown."""
    lines = [
        "",
        "| set | mode, start | images | top-1 (95 %) | balanced accuracy (95 %) | linear probe as stated | goal"
        " | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        stated = PROBE[row["set"]]
        met = "met" if row["top1"]["value"] >= stated[0] else "NOT MET"
        cells = [
            row["set"],
            f"{row['mode']}, {row['start']}",
            f"{row['images']:,}",
            *(f"{row[key]['value']:.3f} ({_interval(row[key])})" for key in ("top1", "balanced_accuracy")),
            f"{stated[0]:.3f} / {stated[1]:.3f}",
            f">= {stated[0]:.3f}: {met}" if row["start"] == "published weights" else "far below",
            f"{row['seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(figure: dict[str, Any]) -> str:
    return f"{figure['low']:.3f} to {figure['high']:.3f}" if figure["low"] is not None else "no interval"


def few(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each set, start and share: top-1 by seed."""
    rows = []
    for name in args.finetune_sets:
        for is_pretrained in (True, False):
            for share in args.shares:
                found = []
                for seed in range(1, args.seeds + 1):
                    corpus = learning_data.few_labels(args.cache, name, share, seed)
                    found.append(finetuned(args, corpus, "head", is_pretrained, seed))
                start = "published weights" if is_pretrained else "random weights"
                tops, images = [one["top1"]["value"] for one in found], found[0]["images"]
                rows.append({"set": name, "start": start, "share": share, "images": images, "top1": tops})
    return rows


def few_table(rows: Sequence[dict[str, Any]]) -> str:
    """Few labels in Markdown."""
    lines = ["", "| set | head on Lite0 of | labels | images | top-1, mean (range of seeds) |", "|---|---|---|---|---|"]
    for row in rows:
        tops = row["top1"]
        shown = f"{statistics.mean(tops):.3f} ({min(tops):.3f} to {max(tops):.3f})"
        lines.append(f"| {row['set']} | {row['start']} | {row['share']:.0%} | {row['images']:,} | {shown} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], folder: Path) -> Path:
    """The few-label curves as a page."""
    make_importable()
    from eagleray.assure.charts import Curve, Curves
    from eagleray.assure.report import Report
    from eagleray.pages.page import write_page

    curves = []
    for name, start in sorted({(row["set"], row["start"]) for row in rows}):
        own = sorted(
            (float(np.log10(row["images"])), statistics.mean(row["top1"]))
            for row in rows
            if (row["set"], row["start"]) == (name, start)
        )
        curves.append(Curve(f"{name}, {start}", tuple(own)))
    block = Curves("Top-1 by labels", tuple(curves), "log10 of labelled images", "top-1", has_marks=True)
    return write_page(folder, Report("Few labels", datetime.now(UTC).isoformat(timespec="seconds"), (block,)))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what was asked and prints the tables."""
    args = parse(argv)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    args.cache.mkdir(parents=True, exist_ok=True)
    began, target = time.time(), args.json or args.cache / "bench_quality.json"
    packages = {name: metadata.version(name) for name in ("torch", "timm", "lightly")}
    found: dict[str, Any] = {"machine": {**describe_machine(args), **packages}}
    print("\n".join(f"# {name}: {value}" for name, value in found["machine"].items()), flush=True)
    for part, run, table in (
        ("selfsup", selfsup, selfsup_table),
        ("finetune", finetune, finetune_table),
        ("few", few, few_table),
    ):
        if part in args.only:
            found[part] = run(args)
            print(table(found[part]), flush=True)
    if "few" in found:
        print(f"\n# the curve: {plot(found['few'], args.cache / 'few-labels')}")
    found["minutes"] = round((time.time() - began) / 60, 1)
    target.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n# {found['minutes']} minutes; every figure in {target}")
    shutil.rmtree(args.cache / "quality-runs", ignore_errors=True)


if __name__ == "__main__":
    main()
