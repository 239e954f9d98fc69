"""Training beside its peers: views, SimCLR, the linear probe, Ray Train's share, and full fine-tuning.

Every round runs both sides of every contest once, one after the other, each in fresh processes on the same two cores,
the same images (warm page cache), model, optimizer, batch and number of steps; a round begins with the other side each
time. Ours is the whole command of the command line, with its probes, reports and checkpoints. Quoted is the median over
rounds of the ratio within a round, with its least and most. Prints Markdown tables, writes every figure to a JSON file.

Example:
    python tests/benchmarks/bench_train.py  # all; the peer of the linear probe alone takes 3 minutes a round
    python tests/benchmarks/bench_train.py --rounds 3 --only simclr,ray --scale 0.5
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import learning_data
import numpy as np
from bench_score import describe_machine
from checkout import environment
from contestants import HERE
from learning_data import Neighbours, Pictures, difference
from training_contestants import SWEPT, Ours, Peer, Trial

LITE0 = "tf_efficientnet_lite0"
KNN_MARGIN = 1.0  # points, issue 3
SPEED = "images/s, steady"
WHOLE = "seconds, whole command"


@dataclass
class Contest:
    """Two sides, what is compared, and the goal of issue 3.

    Attributes:
        name: Of --only.
        what: Shown.
        sides: ``ours`` first.
        measure: SPEED or WHOLE.
        goal: Least median of peer time / our time.
        judge: Gives what else there is to tell of the rounds.
    """

    name: str
    what: str
    sides: dict[str, Ours | Peer]
    measure: str
    goal: float
    judge: Callable[[list[dict[str, Trial]]], dict[str, Any]] | None = None
    rounds: list[dict[str, Trial]] = field(default_factory=list)
    judged: dict[str, Any] = field(default_factory=dict)

    def seconds(self, who: str) -> list[float]:
        """Seconds an image of the steady part, or of the whole command, by round."""
        return [1 / r[who].rate if self.measure == SPEED else r[who].cost.seconds for r in self.rounds]

    def ratios(self) -> list[float]:
        """Peer time / our time by round: how many times as fast ours is."""
        return [b / a for a, b in zip(self.seconds("ours"), self.seconds("peer"), strict=True)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(NAMES), help=f"any of {', '.join(NAMES)}")
    parser.add_argument("--scale", type=float, default=1.0, help="of steps and images: below 1 for a trial")
    parser.add_argument("--backbone", default="mobilenetv3_small_050", help="of SimCLR and Ray Train's share")
    parser.add_argument("--small", default="mobilenetv3_small_050", help="backbone where the input dominates")
    parser.add_argument("--size-px", type=int, default=64, help="of SimCLR and Ray Train's share")
    parser.add_argument("--no-sweep", action="store_true", help="peers at their first setting: for a trial")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/eagleray-bench"))
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, help="where the figures go; default CACHE/bench_train.json")
    args = parser.parse_args(argv)
    args.only = tuple(args.only.split(","))
    unknown = set(args.only) - set(NAMES)
    if unknown:
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; any of {', '.join(NAMES)}")
    return args


def scaled(args: argparse.Namespace, number: int, least: int) -> int:
    """A number of steps or images at the scale asked for."""
    return max(least, round(number * args.scale))


def pretrain_words(pictures: Pictures, args: argparse.Namespace, batch: int, workers: int) -> list[str]:
    """`eagleray pretrain` of a contest."""
    words = ["pretrain", "--corpus", str(pictures.corpus), "--method", "simclr", "--backbone", args.backbone]
    return [*words, "--size-px", str(args.size_px), "--batch-size", str(batch), "--workers", str(workers)]


def simclr(args: argparse.Namespace, work: Path) -> Contest:
    """End to end SimCLR beside lightly's example, with kNN after equal steps."""
    pictures = learning_data.make(args.cache, "trashnet")
    batch, steps, warm = 64, scaled(args, 60, 20), 6
    ours = Ours(work, "simclr", pretrain_words(pictures, args, batch, 0), {"max_steps": steps}, warm)
    options = {"folder": pictures.folder, "backbone": args.backbone, "size": args.size_px, "batch": batch}
    more = {"steps": steps, "warm": warm, "method": "simclr"}
    peer = Peer(work, "lightly's example", "lightly_loop.py", {**options, **more}, _swept(args), keeps_weights=True)

    def judge(rounds: list[dict[str, Trial]]) -> dict[str, Any]:
        knn = Neighbours(pictures.folder, args.size_px, args.backbone)
        right = {who: np.stack([knn.right(found[who].weights) for found in rounds]) for who in ("ours", "peer")}
        before = np.stack([knn.right(None, seed) for seed in range(1, len(rounds) + 1)])
        shares = {who: [float(row.mean()) for row in rows] for who, rows in {**right, "untrained": before}.items()}
        gain = difference(right["ours"], right["peer"])
        return {"knn": shares, "difference": gain, "met": gain[0] >= -KNN_MARGIN}

    what = f"SimCLR, {args.backbone} at {args.size_px} px, batch {batch}, {steps} steps of {pictures.num_images:,}"
    return Contest("simclr", what, {"ours": ours, "peer": peer}, SPEED, 1.5, judge)


def ray(args: argparse.Namespace, work: Path) -> Contest:
    """One worker on Ray Train beside the same loop in one plain process: the same threads on both sides."""
    pictures = learning_data.make(args.cache, "trashnet")
    batch, steps, warm = 64, scaled(args, 60, 20), 6
    settings = {"max_steps": steps, "num_cpus": 2, "threads": 2, "decode_threads": 2}
    ours = Ours(work, "ray train", pretrain_words(pictures, args, batch, 1), settings, warm)
    config = {"corpus": str(pictures.corpus), "out": str(work / "plain"), "backbone": args.backbone, **settings}
    work.mkdir(parents=True, exist_ok=True)
    (work / "plain.json").write_text(json.dumps({**config, "size_px": args.size_px, "batch_size": batch}))
    peer = Peer(work, "plain process", "plain_loop.py", {"config": work / "plain.json", "warm": warm}, ())
    what = f"Ray Train, one worker, the same run: {steps} steps"
    return Contest("ray", what, {"ours": ours, "peer": peer}, SPEED, 1 / 1.03)


def linear(args: argparse.Namespace, work: Path) -> Contest:
    """A linear probe on features that were made once, beside one that makes them in each of its 20 epochs."""
    pictures = learning_data.make(args.cache, "trashnet", scaled(args, 400, 60))
    batch, epochs = 32, 20
    words = ["finetune", "--corpus", str(pictures.corpus), "--from", LITE0, "--mode", "linear"]
    words += ["--batch-size", str(batch), "--epochs", str(epochs)]
    ours = Ours(work, "linear", words, {"is_pretrained": False, "split": "all", "judge": ""})
    options = {"folder": pictures.folder, "backbone": LITE0, "batch": batch, "classes": pictures.num_classes}
    peer = Peer(work, "frozen backbone again", "timm_linear_probe.py", {**options, "epochs": epochs}, _swept(args))
    what = f"linear probe, Lite0 at 224 px, {pictures.num_images} images, {epochs} epochs"
    return Contest("linear", what, {"ours": ours, "peer": peer}, WHOLE, 10.0)


def full(args: argparse.Namespace, work: Path, name: str, pictures: Pictures, steps: int) -> Contest:
    """Full fine-tuning at 224 px beside timm and a DataLoader, from random weights: their values cost no time."""
    backbone, batch, goal = (LITE0, 16, 1.0) if name == "lite0" else (args.small, 16, 1.2)
    steps, warm = scaled(args, steps, 8), 3
    words = ["finetune", "--corpus", str(pictures.corpus), "--from", backbone, "--mode", "full"]
    words += ["--size-px", "224", "--batch-size", str(batch)]
    settings = {"is_pretrained": False, "split": "all", "judge": "", "max_steps": steps}
    ours = Ours(work, name, words, settings, warm)
    options = {"folder": pictures.folder, "backbone": backbone, "size": 224, "batch": batch, "steps": steps}
    more = {"warm": warm, "classes": pictures.num_classes}
    peer = Peer(work, "timm + DataLoader", "timm_finetune.py", {**options, **more}, _swept(args))
    what = f"fine-tuning, {backbone} at 224 px, batch {batch}, {steps} steps of {pictures.name} images"
    return Contest(name, what, {"ours": ours, "peer": peer}, SPEED, goal)


def lite0(args: argparse.Namespace, work: Path) -> Contest:
    """Fine-tuning where the network dominates."""
    return full(args, work, "lite0", learning_data.make(args.cache, "trashnet"), 24)


def large(args: argparse.Namespace, work: Path) -> Contest:
    """Fine-tuning where the input dominates: 12 MP sources."""
    return full(args, work, "large", learning_data.make(args.cache, "large", 96), 16)


CONTESTS = {"simclr": simclr, "linear": linear, "ray": ray, "lite0": lite0, "large": large}
NAMES = ("views", *CONTESTS)


def _swept(args: argparse.Namespace) -> Sequence[dict[str, Any]]:
    return SWEPT[:1] if args.no_sweep else SWEPT


def compete(contest: Contest, rounds: int) -> Contest:
    """Tunes the peer, then runs the rounds."""
    print(f"\n# {contest.what}", flush=True)
    for side in contest.sides.values():
        side.tune()
    for number in range(1, rounds + 1):
        order = sorted(contest.sides, reverse=number % 2 == 0)
        found = {who: contest.sides[who].run(seed=number) for who in order}
        contest.rounds.append(found)
        told = {who: f"{t.rate:.1f} img/s steady, {t.cost.seconds:.1f} s in all" for who, t in found.items()}
        print(f"#   round {number} {json.dumps(told)}", flush=True)
    if contest.judge is not None:
        contest.judged = contest.judge(contest.rounds)
    return contest


def table(contests: Sequence[Contest]) -> str:
    """The paired table in Markdown."""
    lines = [
        "",
        "| contest | peer (settings) | compared | eagleray | peer | times as fast, median (range) | goal"
        " | whole command | CPU | data wait |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for contest in contests:
        ratios, middle = contest.ratios(), statistics.median(contest.ratios())
        shown = [statistics.median(contest.seconds(who)) for who in ("ours", "peer")]
        shown = [1 / value for value in shown] if contest.measure == SPEED else shown
        waits = [found["ours"].wait_percent for found in contest.rounds if found["ours"].wait_percent is not None]
        peer = contest.sides["peer"]
        cells = [
            contest.what,
            f"{peer.name} {json.dumps(peer.used) if peer.used else ''}",
            contest.measure,
            *(f"{value:.1f}" for value in shown),
            spread(ratios),
            f">= {contest.goal:.3g}: {'met' if middle >= contest.goal else 'NOT MET'}",
            spread([found["peer"].cost.seconds / found["ours"].cost.seconds for found in contest.rounds]),
            spread([found["peer"].cost.cpu_s / found["ours"].cost.cpu_s for found in contest.rounds]),
            f"{statistics.median(waits):.0f} %" if waits else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [line for contest in contests if contest.judged for line in knn_lines(contest.judged)]
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def knn_lines(judged: dict[str, Any]) -> list[str]:
    """kNN after equal steps in Markdown."""
    means = {who: 100 * statistics.mean(values) for who, values in judged["knn"].items()}
    gain, low, high = judged["difference"]
    met = "met" if judged["met"] else "NOT MET"
    return [
        "",
        "| kNN (leave one out) after equal steps, mean of the rounds' seeds | eagleray | lightly | untrained"
        " | eagleray - lightly, points (95 %) | goal |",
        "|---|---|---|---|---|---|",
        f"| SimCLR | {means['ours']:.1f} | {means['peer']:.1f} | {means['untrained']:.1f} "
        f"| {gain:+.2f} ({low:+.2f} to {high:+.2f}) | >= -{KNN_MARGIN:g}: {met} |",
    ]


def views(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """bench_views as it stands, in its own process; prints its table."""
    target = work / "views.json"
    words = ["--rounds", str(args.rounds), "--images", str(scaled(args, 128, 64)), "--methods", "simclr,dino"]
    command = [sys.executable, str(HERE / "bench_views.py"), *words, "--cores", str(args.cores), "--json", str(target)]
    done = subprocess.run(command, check=True, env=environment(), stdout=subprocess.PIPE, text=True)
    print("\n" + "\n".join(line for line in done.stdout.splitlines() if not line.startswith("# ")), flush=True)
    found: dict[str, Any] = json.loads(target.read_bytes())
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what was asked and prints the tables."""
    args = parse(argv)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    work, began = args.cache / "training", time.time()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    packages = {name: metadata.version(name) for name in ("torch", "timm", "lightly", "torchvision")}
    machine = {**describe_machine(args), **packages}
    print("\n".join(f"# {name}: {value}" for name, value in machine.items()), flush=True)
    found: dict[str, Any] = {"machine": machine, "contests": {}}
    if "views" in args.only:
        found["views"] = views(args, work)
    contests = [compete(CONTESTS[name](args, work / name), args.rounds) for name in CONTESTS if name in args.only]
    if contests:
        print(table(contests), flush=True)
    for contest in contests:
        rounds = [{who: trial.to_json() for who, trial in found_.items()} for found_ in contest.rounds]
        used = {who: side.used for who, side in contest.sides.items()}
        kept = {"what": contest.what, "measure": contest.measure, "goal": contest.goal, "ratios": contest.ratios()}
        found["contests"][contest.name] = {**kept, "used": used, "rounds": rounds, **contest.judged}
    found["minutes"] = round((time.time() - began) / 60, 1)
    target = args.json or args.cache / "bench_train.json"
    target.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n# {found['minutes']} minutes; every figure in {target}")
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
