"""Serving beside its peers: `eagleray serve`, keys on; naive Ray Serve, as it is and behind HAProxy; LitServe; uvicorn.

Every turn starts one contestant afresh on the same two cores (the client takes part in them, as in every deployment on
one machine) and asks over loopback: one request at a time, then an open loop at fixed arrivals, in which the highest
rate is searched whose p99 keeps the limit (a request without a 200 counts as infinitely late; a rate is given up when
it has failed twice), then twice that rate. A round is one turn of each, begun with another one each time; a ratio is
taken within a round, quoted is its median with its least and most. The state is kept after each round: the same command
goes on where it stopped.

Example:
    python tests/benchmarks/bench_serve.py                                  # light model, 48 KB: about 20 minutes
    python tests/benchmarks/bench_serve.py --contests heavy-48k,light-1m,heavy-1m --minutes 20    # again: it goes on
    python tests/benchmarks/bench_serve.py --soak 30                        # memory and failures at 50 % load
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import archive_maker
import model_maker
from bench_score import describe_machine
from checkout import ROOT
from model_maker import Model
from serving_contestants import Contestant, Load, everyone, serving, tune
from serving_soak import soak

PEERS = ("naive", "proxied", "litserve", "bare")
GOALS = {"naive": 3.5, "proxied": 1.6, "litserve": 1.3, "bare": 1.0}  # issue 5, Speed; for the light model
SINGLE_GOAL, GOODPUT_GOAL, OVERLOAD_GOAL = 1.5, 0.9, 2.0
WARM_S, SINGLE_S, CAPACITY_S, STEP_S, OVERLOAD_S = 1.0, 1.5, 1.5, 3.0, 3.0
MOST_STEP_S = 5.0  # for a rate so low that LEAST_REQUESTS would take longer
LEAST_REQUESTS = 200  # of a step: its p99 rests on 2 of them
FINE, COARSE, MOST_STEPS = 1.05, 1.15, 7  # a rate is found to 5 %
LATE_MS = 25.0  # a client that sends its requests later than this is what limits


@dataclass(frozen=True)
class Contest:
    """What is asked: a model, a kind of picture, and the p99 to keep in ms."""

    model: str
    kind: str
    images: int
    limit_ms: float


CONTESTS = {
    "light-48k": Contest("light", "small", 200, 100.0),
    "heavy-48k": Contest("heavy", "small", 200, 250.0),
    "light-1m": Contest("light", "medium", 60, 100.0),
    "heavy-1m": Contest("heavy", "medium", 60, 250.0),
}


@dataclass(frozen=True)
class Turn:
    """One contestant in one round; latencies in ms, rates per second."""

    seconds_to_ready: float
    single_p50_ms: float
    rate: float
    p99_ms: float
    late_p99_ms: float
    client_cpu_share: float
    offered: float
    goodput: float
    accepted_p99_ms: float
    steps: int
    statuses: dict[str, int]
    tried: list[dict[str, Any]]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ("ours", "default", *PEERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no round that would end after so long")
    parser.add_argument("--contests", default="light-48k", help=f"any of {', '.join(CONTESTS)}")
    parser.add_argument("--only", default=",".join(("ours", *PEERS)), help=f"any of {', '.join(names)}")
    parser.add_argument("--no-sweep", action="store_true", help="peers at their first setting: a trial of this file")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has found")
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES", help="only ours, at 50 %% of its rate")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/eagleray-bench"))
    parser.add_argument("--cores", type=int, default=2, help="cores that everybody, client included, may use")
    parser.add_argument("--json", type=Path, default=None, help="the state; default CACHE/bench_serve.json")
    args = parser.parse_args(argv)
    args.contests, args.only = args.contests.split(","), args.only.split(",")
    for given, known in ((args.contests, CONTESTS), (args.only, names)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown {', '.join(sorted(unknown))}; any of {', '.join(known)}")
    args.json = args.json or args.cache / "bench_serve.json"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what was asked and prints the tables."""
    args = parse(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    args.cache.mkdir(parents=True, exist_ok=True)
    work, began = args.cache / "serve-runs", time.time()
    machine = describe_machine(args)
    print("\n".join(f"# {name}: {value}" for name, value in machine.items()), flush=True)
    state = read_state(args, machine)
    if args.soak:
        contest = CONTESTS[args.contests[0]]
        rounds = state["rounds"].get(args.contests[0], [])
        rates = [found["ours"]["rate"] for found in rounds if "ours" in found]
        if not rates:
            raise SystemExit(f"the rate of {args.contests[0]} is not known yet: run the rounds first")
        model, folder = model_maker.make(args.cache, contest.model), pictures(args, contest)
        state["soak"] = soak(everyone()["ours"], model, folder, work, rate=statistics.median(rates) / 2,
                             minutes=args.soak)  # fmt: skip
    else:
        for name in args.contests:
            compete(name, state, args, work, began + args.minutes * 60)
    write_state(args, state)
    for name in args.contests:
        if state["rounds"].get(name):
            print(tables(name, state["rounds"][name]), flush=True)
    if "soak" in state:
        print("\n# soak: " + json.dumps({key: value for key, value in state["soak"].items() if key != "samples"}))
    print(f"\n# {(time.time() - began) / 60:.1f} minutes; every figure in {args.json}")
    shutil.rmtree(work, ignore_errors=True)


def read_state(args: argparse.Namespace, machine: dict[str, Any]) -> dict[str, Any]:
    """What earlier runs of the same sources have found; figures of two are never mixed."""
    now = sources()
    fresh: dict[str, Any] = {"machine": machine, "sources": now, "settings": {}, "rounds": {}}
    if args.fresh or not args.json.exists():
        return fresh
    state: dict[str, Any] = json.loads(args.json.read_text())
    if state["sources"] != now:
        raise SystemExit(
            f"{args.json} is of other sources ({state['machine']['eagleray']}): --fresh, or another --json"
        )
    return state


def sources() -> str:
    """SHA-256, in hex, of what is measured and how: the code under platform/ and the benchmarks', committed or not."""
    digest = hashlib.sha256()
    ours = [ROOT / "tests/benchmarks" / name for name in ("bench_serve.py", "open_loop.py", "serving_contestants.py")]
    for path in [*sorted((ROOT / "platform").rglob("*.py")), *ours]:
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def write_state(args: argparse.Namespace, state: dict[str, Any]) -> None:
    """Keeps it, whole or not at all."""
    aside = args.json.with_suffix(".part")
    aside.write_text(json.dumps(state, indent=1) + "\n")
    aside.replace(args.json)


def pictures(args: argparse.Namespace, contest: Contest) -> Path:
    """The folder of a contest's pictures."""
    return archive_maker.make(args.cache, contest.kind, contest.images)


def compete(name: str, state: dict[str, Any], args: argparse.Namespace, work: Path, until: float) -> None:
    """Tunes who is not tuned yet, then runs the rounds that are missing, as far as the time goes."""
    contest, known = CONTESTS[name], everyone()
    model, folder = model_maker.make(args.cache, contest.model), pictures(args, contest)
    settings, rounds = state["settings"].setdefault(name, {}), state["rounds"].setdefault(name, [])
    print(f"\n# {name}: {folder}, p99 <= {contest.limit_ms:g} ms", flush=True)
    for key in args.only:
        known[key].limit_ms = contest.limit_ms
        if key not in settings:
            is_swept = len(known[key].candidates) > 1 and not args.no_sweep
            settings[key] = tune(known[key], model, folder, work) if is_swept else dict(known[key].candidates[0])
            write_state(args, state)
        known[key].settings = settings[key]
    longest = 0.0
    while len(rounds) < args.rounds and time.time() + longest < until:
        begin, number = time.time(), len(rounds)
        order = args.only[number % len(args.only) :] + args.only[: number % len(args.only)]
        before = rounds[-1] if rounds else {}
        found: dict[str, Any] = {}
        for key in order:
            start = before.get(key, {}).get("rate") or 0.0
            found[key] = asdict(turn(known[key], model, folder, work, contest=contest, start=start))
            print(f"#   round {number + 1} {key:<9}{describe(found[key])}", flush=True)
        rounds.append(found)
        write_state(args, state)
        longest = max(longest, time.time() - begin)


def describe(found: dict[str, Any]) -> str:
    """A turn in one line."""
    flag = "  THE CLIENT WAS LATE" if found["late_p99_ms"] > LATE_MS else ""
    return (
        f" {found['rate']:7.1f} /s at p99 {found['p99_ms']:6.1f} ms, alone {found['single_p50_ms']:6.2f} ms, at twice"
        f" that {found['goodput']:7.1f} /s in {found['accepted_p99_ms']:6.1f} ms, ready after"
        f" {found['seconds_to_ready']:.0f} s, {found['steps']} steps{flag}"
    )


def turn(contestant: Contestant, model: Model, folder: Path, work: Path, *, contest: Contest, start: float) -> Turn:
    """One contestant, started afresh, measured, and ended."""
    picture = next(iter(sorted(folder.rglob("*.jpg")))).read_bytes()
    with (
        serving(contestant, model, picture, work) as server,
        server.load(folder, contest.images, contest.limit_ms) as load,
    ):
        load.closed(4, WARM_S)
        alone = load.closed(1, SINGLE_S)
        start = start or 0.85 * load.closed(16, CAPACITY_S)["answered_per_s"]
        tried: list[dict[str, Any]] = []

        def measure(rate: float) -> dict[str, Any]:
            tried.append(step(load, rate))
            return tried[-1]

        peak, steps = search(measure, start, contest.limit_ms)
        twice = load.open(2 * peak.get("rate", start), OVERLOAD_S)
        return Turn(
            seconds_to_ready=server.seconds_to_ready,
            single_p50_ms=alone["accepted_p50_ms"] or math.inf,
            rate=peak.get("rate", 0.0),
            p99_ms=peak.get("p99_ms") or math.inf,
            late_p99_ms=peak.get("late_p99_ms") or 0.0,
            client_cpu_share=peak.get("client_cpu_share", 0.0),
            offered=2 * peak.get("rate", start),
            goodput=twice["answered_per_s"],
            accepted_p99_ms=twice["accepted_p99_ms"] or math.inf,
            steps=steps,
            statuses=twice["statuses"],
            tried=tried,
        )


def step(load: Load, rate: float) -> dict[str, Any]:
    """An open loop at one rate, long enough for its p99 to rest on something."""
    return {"rate": rate, **load.open(rate, min(MOST_STEP_S, max(STEP_S, LEAST_REQUESTS / rate)))}


def search(measure: Callable[[float], dict[str, Any]], start: float, limit_ms: float) -> tuple[dict[str, Any], int]:
    """The highest rate whose p99 keeps the limit, found to 5 %: up or down until both sides are known, then between.

    A rate is given up when it has failed twice.

    Args:
        measure: What came of a rate; its ``p99_ms`` is None when it is infinite.
        start: The rate to begin with.
        limit_ms: The limit.

    Returns:
        What came of the best rate (empty when none kept the limit), and how many were tried.
    """
    best: dict[str, Any] = {}
    low, high, rate, steps = 0.0, math.inf, max(start, 2.0), 0
    while steps < MOST_STEPS and high / max(low, 1e-9) > FINE and rate >= 1.0:
        found, steps = measure(rate), steps + 1
        if not _keeps(found, limit_ms):  # a machine that stood still for a moment is not its limit: once more
            found = measure(rate)
        if _keeps(found, limit_ms):
            low, best = rate, found
        else:
            high = rate
        if math.isinf(high):
            rate = low * COARSE**steps  # further with each step that has not found the other side
        else:
            rate = high / COARSE**steps if low == 0.0 else math.sqrt(low * high)
    return best, steps


def _keeps(found: dict[str, Any], limit_ms: float) -> bool:
    return found["p99_ms"] is not None and found["p99_ms"] <= limit_ms


def tables(name: str, rounds: Sequence[dict[str, Any]]) -> str:
    """The paired tables of a contest in Markdown."""
    lines = [
        f"\n{name}: p99 <= {CONTESTS[name].limit_ms:g} ms, {len(rounds)} rounds",
        "",
        "| who | requests/s | ours / theirs | goal | p50 alone, ms | ready after, s |",
        "|---|---|---|---|---|---|",
    ]
    everybody = everyone()
    for key in rounds[0]:
        ratio = paired(rounds, lambda found, key=key: _over(found["ours"]["rate"], found[key]["rate"]))
        goal = GOALS.get(key) if CONTESTS[name].model == "light" else None
        cells = [
            everybody[key].name,
            spread([found[key]["rate"] for found in rounds], "{:.0f}"),
            "" if key == "ours" or not ratio else spread(ratio, "{:.2f}x"),
            "" if goal is None or not ratio else f">= {goal:g} {verdict(statistics.median(ratio) >= goal)}",
            spread([found[key]["single_p50_ms"] for found in rounds], "{:.2f}"),
            spread([found[key]["seconds_to_ready"] for found in rounds], "{:.0f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *overload_table(rounds), *single_line(rounds)])


def overload_table(rounds: Sequence[dict[str, Any]]) -> list[str]:
    """What is left at twice the load."""
    lines = [
        "",
        "| at twice its rate | answered/s | of its peak | p99 of the accepted, ms | times the p99 at its peak |",
        "|---|---|---|---|---|",
    ]
    for key in rounds[0]:
        kept = [_over(found[key]["goodput"], found[key]["rate"]) for found in rounds]
        slower = [_over(found[key]["accepted_p99_ms"], found[key]["p99_ms"]) for found in rounds]
        told = ["", ""]
        if key == "ours":
            told[0] = f", goal >= {GOODPUT_GOAL:g} {verdict(statistics.median(kept) >= GOODPUT_GOAL)}"
            told[1] = f", goal <= {OVERLOAD_GOAL:g} {verdict(statistics.median(slower) <= OVERLOAD_GOAL)}"
        cells = [
            everyone()[key].name,
            spread([found[key]["goodput"] for found in rounds], "{:.0f}"),
            spread(kept, "{:.2f}") + told[0],
            spread([found[key]["accepted_p99_ms"] for found in rounds], "{:.0f}"),
            spread(slower, "{:.2f}x") + told[1],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def single_line(rounds: Sequence[dict[str, Any]]) -> list[str]:
    """One request at a time against the bare process."""
    if "bare" not in rounds[0] or "ours" not in rounds[0]:
        return []
    ratio = paired(rounds, lambda found: _over(found["ours"]["single_p50_ms"], found["bare"]["single_p50_ms"]))
    goal = verdict(statistics.median(ratio) <= SINGLE_GOAL)
    return ["", f"p50 alone, ours / bare: {spread(ratio, '{:.2f}x')}, goal <= {SINGLE_GOAL:g} {goal}"]


def paired(rounds: Sequence[dict[str, Any]], ratio: Callable[[dict[str, Any]], float]) -> list[float]:
    """A ratio in each round; none of a contest without ours."""
    return [ratio(found) for found in rounds] if "ours" in rounds[0] else []


def _over(one: float, other: float) -> float:
    return one / other if other else math.inf


def spread(values: Sequence[float], form: str) -> str:
    """Median and range."""
    if not values:
        return ""
    return f"{form} ({form} to {form})".format(statistics.median(values), min(values), max(values))


def verdict(is_met: bool) -> str:
    """In a word."""
    return "met" if is_met else "NOT MET"


if __name__ == "__main__":
    main()
