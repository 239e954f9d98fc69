"""What is learnt, on real images: self-supervised features by kNN, and fine-tuning (few labels: bench_labels.py).

selfsup: leave-one-out weighted kNN (k 20, tau 0.07) of `eagleray pretrain` beside lightly's reference loop at equal
steps, and beside the backbone before its first step; seeds, first weights and images are the same on both sides.
Differences are paired, over seeds and images, with a 95 % interval that draws both anew. finetune: EfficientNet-Lite0
on a set's own split, from its published weights and from none.

Weights and figures are kept under CACHE/quality: the same command again does only what is missing. A command begins no
run that would not end within its --minutes (none at 0), and prints the tables of what there is.

Example:
    python tests/benchmarks/bench_quality.py --only selfsup --minutes 15     # again and again: 36 runs, an hour in all
    python tests/benchmarks/bench_quality.py --only selfsup --minutes 0      # the table so far
    python tests/benchmarks/bench_quality.py --steps 60 --seeds 1 --epochs 1      # minutes: a trial
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import learning_data
import numpy as np
from bench_score import describe_machine
from checkout import EAGLERAY, SOURCES
from contestants import HERE, metered
from learning_data import Neighbours, Pictures, difference
from training_contestants import Ours, Peer

PARTS = ("selfsup", "finetune")
SIZE_PX = {"trashnet": 64, "cifar": 32, "apple": 64}
PROBE = {"trashnet": (0.847, 0.791), "apple": (0.979, 0.982)}  # shared/data/README.md: accuracy, balanced accuracy
SIDES = ("eagleray", "lightly")
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
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of a self-supervised run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--finetune-sets", default="trashnet", help="any of trashnet, apple")
    parser.add_argument("--epochs", type=int, default=8, help="of fine-tuning")
    parser.add_argument("--max-steps", type=int, default=None, help="of fine-tuning, below its epochs: for a trial")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of this command; 0 only prints")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/eagleray-bench"))
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, help="default CACHE/bench_quality.json")
    args = parser.parse_args(argv)
    for name in ("only", "sets", "methods", "finetune_sets"):
        setattr(args, name, tuple(getattr(args, name).split(",")))
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


@cache
def version(who: str) -> str:
    """Digest of the sources that a side's weights come from: what other sources have made is not taken for theirs."""
    if who == "lightly":
        files = sorted((HERE / "peers").glob("lightly_*.py"))
    else:
        learn = Path(SOURCES) / "eagleray" / "learn"
        loop = [learn / f"{name}.py" for name in ("training", "optimization", "feeding", "order", "averaging")]
        files = [*sorted((learn / "selfsup").glob("*.py")), *loop]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]


class Budget:
    """The minutes of a command: a run begins when the longest of its kind would still end within them.

    Args:
        minutes: In all.
    """

    def __init__(self, minutes: float) -> None:
        self._until, self._longest, self.left_out = time.monotonic() + 60 * minutes, dict[str, float](), 0

    def allows(self, kind: str) -> bool:
        """Whether a run may begin; counts those that may not."""
        is_allowed = time.monotonic() + self._longest.get(kind, 0.0) < self._until
        self.left_out += not is_allowed
        return is_allowed

    def took(self, kind: str, seconds: float) -> None:
        """Learns how long a run is."""
        self._longest[kind] = max(seconds, self._longest.get(kind, 0.0))


def trained(side: Ours | Peer, seed: int, kept: Path, budget: Budget, kind: str) -> dict[str, Any] | None:
    """Runs a side unless its weights are there; what the run took. None: not there, and no time for it."""
    told = kept.with_suffix(".json")
    if not (kept.is_file() and told.is_file()):
        if not budget.allows(kind):
            return None
        side.tune()
        trial = side.run(seed)
        assert trial.weights is not None  # both sides keep theirs
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(trial.weights, kept)
        told.write_text(json.dumps({"loss": trial.loss, **vars(trial.cost)}))
    found: dict[str, Any] = json.loads(told.read_bytes())
    budget.took(kind, found["seconds"])
    return found


class Judge:
    """kNN of weights on a set, kept beside them; the pictures are loaded when they are first needed."""

    def __init__(self, args: argparse.Namespace, pictures: Pictures, size_px: int) -> None:
        self._args, self._pictures, self._size_px = args, pictures, size_px
        self._knn: Neighbours | None = None

    def right(self, weights: Path | None, seed: int = 0) -> np.ndarray:
        """bool (N,), as Neighbours.right."""
        stem = f"{self._pictures.name}-{self._pictures.num_images}-{self._args.backbone}-{self._size_px}px"
        home = self._args.cache / "quality"
        kept = weights.with_suffix(".right.npy") if weights else home / f"{stem}-untrained-seed{seed}.right.npy"
        if not kept.is_file():
            if self._knn is None:
                self._knn = Neighbours(self._pictures.folder, self._size_px, self._args.backbone)
            kept.parent.mkdir(parents=True, exist_ok=True)
            np.save(kept, self._knn.right(weights, seed))
        found: np.ndarray = np.load(kept)
        return found


@dataclass
class Found:
    """What is known of a set and a method: bool (N,) and costs by side, one a seed, in order."""

    right: dict[str, list[np.ndarray]] = field(default_factory=lambda: {who: [] for who in SIDES})
    before: list[np.ndarray] = field(default_factory=list)
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {who: [] for who in SIDES})


def selfsup(args: argparse.Namespace, budget: Budget) -> list[dict[str, Any]]:
    """A row for each set and method of which both sides of a seed are there; seed by seed, so that pieces are even."""
    found: dict[tuple[str, str], Found] = {(name, method): Found() for name in args.sets for method in args.methods}
    sets = {name: learning_data.make(args.cache, name) for name in args.sets}
    judges = {name: Judge(args, sets[name], args.size_px or SIZE_PX[name]) for name in args.sets}
    work = args.cache / "quality-runs"
    work.mkdir(parents=True, exist_ok=True)
    for seed in range(1, args.seeds + 1):
        for (name, method), one in found.items():
            size_px, told = args.size_px or SIZE_PX[name], {}
            stem = f"{name}-{sets[name].num_images}-{args.backbone}-{size_px}px-{method}-b{args.batch}-s{args.steps}"
            home = args.cache / "quality"
            kept = {who: home / f"{stem}-seed{seed}-{who}-{version(who)}.safetensors" for who in SIDES}
            for who, side in sides(args, sets[name], method, work).items():
                told[who] = trained(side, seed, kept[who], budget, f"{name} {method} {who}")
            runs = {who: took for who, took in told.items() if took is not None}
            if len(runs) < len(SIDES):
                continue
            one.before.append(judges[name].right(None, seed))
            for who, took in runs.items():
                one.runs[who].append(took)
                one.right[who].append(judges[name].right(kept[who]))
                was = f"kNN {100 * one.right[who][-1].mean():.1f}, untrained {100 * one.before[-1].mean():.1f}"
                print(f"#   {stem} seed {seed} {who}: {was}, {took['seconds']:.0f} s", flush=True)
    shutil.rmtree(work, ignore_errors=True)
    return [selfsup_row(args, *key, one) for key, one in found.items() if one.before]


def selfsup_row(args: argparse.Namespace, name: str, method: str, found: Found) -> dict[str, Any]:
    """kNN, differences and costs of a set and a method."""
    ours, theirs, before = (np.stack(rows) for rows in (*(found.right[who] for who in SIDES), found.before))
    return {
        "set": name,
        "method": method,
        "what": f"{args.backbone}, {args.size_px or SIZE_PX[name]} px, batch {args.batch}, {args.steps} steps",
        "knn": {
            who: [100 * float(one.mean()) for one in values]
            for who, values in (("eagleray", ours), ("lightly", theirs), ("untrained", before))
        },
        "against_lightly": difference(ours, theirs),
        "against_untrained": difference(ours, before),
        "runs": found.runs,
    }


def selfsup_table(rows: Sequence[dict[str, Any]]) -> str:
    """kNN in Markdown."""
    lines = [
        "",
        "| set, method | run | seeds | eagleray (range) | lightly | untrained | - lightly, points (95 %) | goal"
        " | - untrained, points (95 %) | goal | CPU-minutes a run, eagleray : lightly |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        (gain, low, high), (rise, least, most) = row["against_lightly"], row["against_untrained"]
        wanted = SIMCLR_GAIN if (row["method"], row["set"]) == ("simclr", "trashnet") else 0.0
        is_above = least > 0 and rise >= wanted
        ours = row["knn"]["eagleray"]
        cells = [
            f"{row['set']}, {row['method']}",
            row["what"],
            str(len(ours)),
            f"{statistics.mean(ours):.1f} ({min(ours):.1f} to {max(ours):.1f})",
            *(f"{statistics.mean(row['knn'][who]):.1f}" for who in ("lightly", "untrained")),
            f"{gain:+.2f} ({low:+.2f} to {high:+.2f})",
            f">= -{MARGIN:g}: {'met' if gain >= -MARGIN else 'NOT MET'}",
            f"{rise:+.2f} ({least:+.2f} to {most:+.2f})",
            f"> 0{f', >= {wanted:g}' if wanted else ''}: {'met' if is_above else 'NOT MET'}",
            " : ".join(f"{statistics.mean(one['cpu_s'] for one in row['runs'][who]) / 60:.1f}" for who in SIDES),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def finetuned(
    args: argparse.Namespace, budget: Budget, corpus: Path, mode: str, is_pretrained: bool, seed: int
) -> dict[str, Any] | None:
    """One `eagleray finetune` of Lite0, judged on the test split; kept by what it was told. None: no time for it."""
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
        if not budget.allows(mode):
            return None
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
    budget.took(mode, found["seconds"])
    top1 = found["top1"]
    print(f"#   {kept.stem}: {top1['value']:.3f} ({top1['low']:.3f} to {top1['high']:.3f})", flush=True)
    return found


def whole_corpus(args: argparse.Namespace, name: str) -> Path:
    """The set's own zip as a corpus, with its split and groups."""
    return learning_data.ingested(args.cache, learning_data.data_folder() / f"{learning_data.SETS[name][0]}.zip")


def finetune(args: argparse.Namespace, budget: Budget) -> list[dict[str, Any]]:
    """A row for each set and start."""
    rows = []
    for name in args.finetune_sets:
        corpus = whole_corpus(args, name)
        for mode, is_pretrained in (("head", True), ("full", True), ("full", False)):
            found = finetuned(args, budget, corpus, mode, is_pretrained, seed=1)
            if found is None:
                continue
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


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what was asked and prints the tables."""
    args = parse(argv)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    args.cache.mkdir(parents=True, exist_ok=True)
    budget, began, target = Budget(args.minutes), time.time(), args.json or args.cache / "bench_quality.json"
    packages = {name: metadata.version(name) for name in ("torch", "timm", "lightly")}
    found: dict[str, Any] = {"machine": {**describe_machine(args), **packages}}
    print("\n".join(f"# {name}: {value}" for name, value in found["machine"].items()), flush=True)
    for part, run, table in (
        ("selfsup", selfsup, selfsup_table),
        ("finetune", finetune, finetune_table),
    ):
        if part in args.only:
            found[part] = run(args, budget)
            print(table(found[part]), flush=True)
    found["minutes"] = round((time.time() - began) / 60, 1)
    target.write_text(json.dumps(found, indent=1) + "\n")
    left = f"; {budget.left_out} runs are left: the same command again does them" if budget.left_out else ""
    print(f"\n# {found['minutes']} minutes{left}; every figure in {target}")
    shutil.rmtree(args.cache / "quality-runs", ignore_errors=True)


if __name__ == "__main__":
    main()
