"""Scoring beside its peers: `eagleray score` against canonical Ray Data, a hand-written two-process loop, and daft.

Every round runs every contestant once, one after the other, each in fresh processes on the same two cores, the same
images (warm page cache), the same ONNX model, engine (ONNX Runtime) and target pixels. A round begins with another
contestant each time. Quoted is the median over rounds of the ratio peer / eagleray within a round, with its least and
most. Prints a Markdown table and writes every figure to a JSON file.

Example:
    python tests/benchmarks/bench_score.py                                                   # all, about an hour
    python tests/benchmarks/bench_score.py --rounds 1 --images 200 --only loop --models light
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import archive_maker
import model_maker
from checkout import EAGLERAY, ROOT
from contestants import Outcome, contestants, metered
from model_maker import Model
from resume import resume_after_kill

PEERS = ("ray", "tuned", "loop", "daft", "auto")
SINGLE = ("hundred", "resume")
GOALS = {  # issue 2, Speed and memory: the least median ratio, by peer and contest
    ("ray", "small light"): 4.0,
    ("ray", "small heavy"): 2.0,
    ("ray", "large light"): 4.0,
    ("loop", "small light"): 0.95,
    ("loop", "small heavy"): 0.95,
    ("loop", "large light"): 0.95,
    ("daft", "small light"): 1.5,
    ("daft", "small heavy"): 1.5,
    ("daft", "large light"): 1.5,
}
HUNDRED_GOAL_S = 3.0
RESUME_ROUNDS = 3  # a count of images, not a time
SWEEP_IMAGES = {"small": 400, "large": 40}


@dataclass
class Contest:
    """One archive and one model; what each contestant did in each round."""

    name: str
    archive: Path
    model: Model
    sweep_images: int
    peers: tuple[str, ...]
    rounds: list[dict[str, Outcome]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def ratios(self, peer: str, what: str) -> list[float]:
        """Peer / ours in each round; `what` is seconds_steady, seconds or cpu_s."""
        return [_value(found[peer], what) / _value(found["ours"], what) for found in self.rounds]

    def rate(self, who: str, what: str = "seconds_steady") -> float:
        """The median images per second of a contestant."""
        return statistics.median(found[who].images / _value(found[who], what) for found in self.rounds)

    def agreement(self, peer: str) -> float:
        """Share of images with the same top-1 as ours, in the last round."""
        ours, theirs = self.rounds[-1]["ours"].top1, self.rounds[-1][peer].top1
        if set(ours) != set(theirs):
            raise SystemExit(f"{self.name}: {peer} scored other images than eagleray: {len(theirs)} and {len(ours)}")
        return sum(ours[name] == theirs[name] for name in ours) / len(ours)


def _value(outcome: Outcome, what: str) -> float:
    return outcome.seconds_steady if what == "seconds_steady" else float(getattr(outcome.cost, what))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=5_000, help="of 500x375; 12 MP: at most 300")
    parser.add_argument("--archives", default="small,large", help="small = 500x375, large = 12 MP")
    parser.add_argument("--models", default="light,heavy", help="12 MP always runs with the first of these only")
    parser.add_argument("--only", default=",".join(PEERS + SINGLE), help=f"any of {', '.join(PEERS + SINGLE)}")
    parser.add_argument(
        "--no-sweep", action="store_true", help="peers at their first setting: for a trial of this file"
    )
    parser.add_argument("--cache", type=Path, default=Path("/tmp/eagleray-bench"))
    parser.add_argument("--cores", type=int, default=2, help="cores that every contestant may use")
    parser.add_argument("--json", type=Path, default=None, help="where the figures go; default CACHE/bench_score.json")
    args = parser.parse_args(argv)
    args.only, args.models, args.archives = (tuple(text.split(",")) for text in (args.only, args.models, args.archives))
    unknown = set(args.only) - set(PEERS + SINGLE)
    if unknown:
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; any of {', '.join(PEERS + SINGLE)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what was asked and prints the tables."""
    args = parse(argv)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    args.cache.mkdir(parents=True, exist_ok=True)
    work = args.cache / "runs"
    began = time.time()
    machine = describe_machine(args)
    print("\n".join(f"# {name}: {value}" for name, value in machine.items()), flush=True)
    models = {name: model_maker.make(args.cache, name) for name in args.models}
    found: dict[str, Any] = {"machine": machine, "contests": {}}
    if set(args.only) & set(PEERS):
        contests = [compete(each, args, work) for each in plan(args, models)]
        print(comparison_table(contests), flush=True)
        found["contests"] = {each.name: contest_json(each) for each in contests}
    if "hundred" in args.only:
        found["hundred"] = hundred(args, models, work)
        print(hundred_table(found["hundred"]), flush=True)
    if "resume" in args.only:
        archive = archive_maker.make(args.cache, "small", args.images)
        rounds = min(args.rounds, RESUME_ROUNDS)
        found["resume"] = resume_after_kill(next(iter(models.values())), archive, work, rounds)
        print(resume_table(found["resume"]), flush=True)
    found["minutes"] = round((time.time() - began) / 60, 1)
    target = args.json or args.cache / "bench_score.json"
    target.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n# {found['minutes']} minutes; every figure in {target}")
    shutil.rmtree(work, ignore_errors=True)


def describe_machine(args: argparse.Namespace) -> dict[str, Any]:
    """Where and with what: without it a figure says nothing."""
    names = ("ray", "onnxruntime", "openvino", "simplejpeg", "pillow", "numpy", "pyarrow")
    versions = {name: metadata.version(name) for name in names}
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, check=False)
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"# WARNING: the machine is not idle (load {load:.1f}): these figures are not to be quoted", flush=True)
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": f"{cpu or platform.processor()}, {args.cores} cores used of {os.cpu_count()}",
        "load_before": round(load, 2),
        "python": platform.python_version(),
        "eagleray": commit.stdout.decode().strip(),
        **versions,
        "rounds": args.rounds,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def plan(args: argparse.Namespace, models: dict[str, Model]) -> list[Contest]:
    """The contests: every model over the small images, the first model over the large ones."""
    contests: list[Contest] = []
    peers = tuple(name for name in PEERS if name in args.only and name != "auto")
    if "small" in args.archives:
        archive = archive_maker.make(args.cache, "small", args.images)
        contests += [
            Contest(f"small {name}", archive, model, SWEEP_IMAGES["small"], peers) for name, model in models.items()
        ]
        if "auto" in args.only:  # the choice of an engine tells where the engine is what costs
            contests[-1].peers += ("auto",)
    if "large" in args.archives:
        name, model = next(iter(models.items()))
        archive = archive_maker.make(args.cache, "large", min(args.images, 300))
        contests.append(Contest(f"large {name}", archive, model, SWEEP_IMAGES["large"], peers))
    return contests


def compete(contest: Contest, args: argparse.Namespace, work: Path) -> Contest:
    """Tunes every peer, then runs the rounds."""
    print(f"\n# {contest.name}: {contest.archive}", flush=True)
    for path in contest.archive.rglob("*.jpg"):  # into the page cache, for all alike
        path.read_bytes()
    everyone = contestants(work, args.cache, contest.peers)
    for key, each in everyone.items():
        if not args.no_sweep:
            each.tune(contest.model, contest.archive, contest.sweep_images)
        contest.settings[key] = each.settings
    order = list(everyone)
    for number in range(args.rounds):
        turn = order[number % len(order) :] + order[: number % len(order)]
        outcomes = {}
        for key in turn:
            outcomes[key] = everyone[key].run(contest.model, contest.archive)
            rate = outcomes[key].images / outcomes[key].seconds_steady
            seconds = outcomes[key].cost.seconds
            print(f"#   round {number + 1} {key:<5} {rate:8.1f} img/s steady, {seconds:7.1f} s in all", flush=True)
        contest.rounds.append(outcomes)
    return contest


def comparison_table(contests: Sequence[Contest]) -> str:
    """The paired table in Markdown."""
    lines = [
        "",
        "| archive, model | peer | eagleray img/s | peer img/s | times as fast | goal | whole command | CPU"
        " | peak MiB, eagleray : peer | same top-1 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for contest in contests:
        for peer in contest.peers:
            steady = contest.ratios(peer, "seconds_steady")
            goal = GOALS.get((peer, contest.name))
            met = "" if goal is None else f">= {goal:g} {'met' if statistics.median(steady) >= goal else 'NOT MET'}"
            peaks = [statistics.median(r[who].cost.peak_rss_mib for r in contest.rounds) for who in ("ours", peer)]
            cells = [
                f"{len(contest.rounds[0]['ours'].top1):,} {contest.name}",
                f"{peer} ({engine})" if (engine := contest.rounds[0][peer].engine) != "onnx" else peer,
                f"{contest.rate('ours'):.1f}",
                f"{contest.rate(peer):.1f}",
                spread(steady),
                met,
                spread(contest.ratios(peer, "seconds")),
                spread(contest.ratios(peer, "cpu_s")),
                f"{peaks[0]:,.0f} : {peaks[1]:,.0f}",
                f"{contest.agreement(peer):.2%}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f}x ({min(values):.2f} to {max(values):.2f})"


def contest_json(contest: Contest) -> dict[str, Any]:
    """Every figure of a contest."""
    rounds = [{key: outcome.to_json() for key, outcome in found.items()} for found in contest.rounds]
    peers = [key for key in contest.rounds[0] if key != "ours"]
    return {
        "archive": str(contest.archive),
        "settings": contest.settings,
        "rounds": rounds,
        "agreement": {peer: contest.agreement(peer) for peer in peers},
    }


def hundred(args: argparse.Namespace, models: dict[str, Model], work: Path) -> dict[str, list[float]]:
    """Seconds of whole `eagleray score` commands over 100 images: no Ray, no torch, one machine."""
    archive = archive_maker.make(args.cache, "small", 100)
    found: dict[str, list[float]] = {}
    for name, model in models.items():
        ours = contestants(work, args.cache, ())["ours"]
        found[name] = [ours.run(model, archive).cost.seconds for _ in range(args.rounds)]
    command = [*EAGLERAY, "--help"]
    found["eagleray --help"] = [metered(command, work / "help.log")[1].seconds for _ in range(args.rounds)]
    return found


def hundred_table(found: dict[str, list[float]]) -> str:
    """Seconds of the short commands in Markdown."""
    lines = ["", "| command | seconds, median (range) | goal |", "|---|---|---|"]
    for name, seconds in found.items():
        is_help = name == "eagleray --help"
        goal = 0.5 if is_help else HUNDRED_GOAL_S
        met = "met" if statistics.median(seconds) < goal else "NOT MET"
        what = name if is_help else f"eagleray score of 100 images, {name}, in process"
        shown = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        lines.append(f"| {what} | {shown} | < {goal:g} {met} |")
    return "\n".join(lines)


def resume_table(rounds: Sequence[dict[str, Any]]) -> str:
    """What a resume did again, in Markdown."""
    lines = [
        "",
        "| kill -9 at 50 % | committed then | done again | units done again | workers | goal | resume s | rows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, row in enumerate(rounds, 1):
        met = "met" if row["units_again"] <= row["workers"] else "NOT MET"
        cells = [
            f"round {number}, {row['images']:,} images",
            f"{row['committed']:,}",
            f"{row['images_again']:,}",
            str(row["units_again"]),
            str(row["workers"]),
            f"<= 1 unit a worker {met}",
            f"{row['seconds']:.1f}",
            f"{row['rows']:,} of {row['distinct']:,} distinct",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
