"""Memory of the driver and cost of an image as the archive grows: 2,000, 20,000 and 200,000 tiny images.

The images are 32 to 64 px and the model is a mean and a matrix, so what is left is the pipeline's own cost: listing,
units, reading, writing, counting. Measured for `eagleray score` on Ray and for `eagleray ingest`, each run in a fresh
process tree; driver = the process that a person starts, without its workers and without Ray's daemons.

Example:
    python tests/benchmarks/bench_memory.py
    python tests/benchmarks/bench_memory.py --counts 500,2000 --rounds 1 --verbs score
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import archive_maker
import model_maker
from bench_score import describe_machine
from checkout import EAGLERAY
from contestants import metered

FLAT_COST = 1.10  # issue 2: the cost of an image at 200k within 10 % of that at 20k
INGEST_DRIVER_MIB = 1_500.0  # issue 2: ingesting 200k small files stays under 1.5 GB on the driver
FLAT_DRIVER = 1.25  # "flat": a hundred times the images may not take a quarter more


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", default="2000,20000,200000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--verbs", default="score,ingest")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/eagleray-bench"))
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, help="default CACHE/bench_memory.json")
    args = parser.parse_args(argv)
    args.counts = sorted(int(text) for text in args.counts.split(","))
    args.verbs = args.verbs.split(",")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every verb over every archive, the sizes interleaved, and prints the table."""
    args = parse(argv)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    work = args.cache / "runs"
    machine = describe_machine(args)
    print("\n".join(f"# {name}: {value}" for name, value in machine.items()), flush=True)
    bundle = model_maker.make(args.cache, "tiny").bundle
    archives = {count: archive_maker.make(args.cache, "tiny", count) for count in args.counts}
    found: dict[str, dict[int, list[dict[str, float]]]] = {verb: {n: [] for n in args.counts} for verb in args.verbs}
    for number in range(args.rounds):
        for verb in args.verbs:
            for count in args.counts:
                row = measure(verb, archives[count], bundle, work)
                found[verb][count].append(row)
                print(f"#   round {number + 1} {verb} {count}: {json.dumps(row)}", flush=True)
    for verb in args.verbs:
        print(table(verb, found[verb]), flush=True)
    target = args.json or args.cache / "bench_memory.json"
    target.write_text(json.dumps({"machine": machine, "runs": found}, indent=1) + "\n")
    print(f"\n# every figure in {target}")
    shutil.rmtree(work, ignore_errors=True)


def measure(verb: str, archive: Path, bundle: Path, work: Path) -> dict[str, float]:
    """One run: seconds, CPU seconds, peaks in MiB; for score the seconds of its steady state too."""
    out = work / f"memory-{verb}"
    shutil.rmtree(out, ignore_errors=True)
    arguments = ["--model", str(bundle), "--runtime", "onnx"] if verb == "score" else []
    command = [*EAGLERAY, verb, str(archive), *arguments, "--out", str(out), "--plain", "--json"]
    _, cost = metered(command, out.with_suffix(".log"))
    row: dict[str, Any] = {**vars(cost), "seconds_steady": cost.seconds}
    if verb == "score":
        row["seconds_steady"] = json.loads((out / "run.json").read_bytes())["seconds_steady"]
    shutil.rmtree(out, ignore_errors=True)
    return {name: round(value, 3) for name, value in row.items()}


def table(verb: str, runs: dict[int, list[dict[str, float]]]) -> str:
    """Medians by size of the archive, and whether the two are flat."""
    middle = {
        count: {name: statistics.median(row[name] for row in rows) for name in rows[0]} for count, rows in runs.items()
    }
    lines = [
        "",
        f"| eagleray {verb}, tiny images | driver peak MiB | all peak MiB | seconds | steady ms/image | CPU ms/image |",
        "|---|---|---|---|---|---|",
    ]
    for count, row in middle.items():
        steady, cpu = (1_000 * row[name] / count for name in ("seconds_steady", "cpu_s"))
        peaks = f"{row['driver_peak_mib']:,.0f} | {row['peak_rss_mib']:,.0f}"
        lines.append(f"| {count:,} | {peaks} | {row['seconds']:.1f} | {steady:.3f} | {cpu:.3f} |")
    lines.append("")
    first, *_, last = (*sorted(middle), max(middle))
    grown = middle[last]["driver_peak_mib"] / middle[first]["driver_peak_mib"]
    lines.append(f"driver memory at {last:,} / {first:,}: {grown:.2f}x ({_met(grown, FLAT_DRIVER)})")
    if len(middle) > 1:
        before = sorted(middle)[-2]
        slower = (middle[last]["seconds_steady"] / last) / (middle[before]["seconds_steady"] / before)
        lines.append(f"cost of an image at {last:,} / {before:,}: {slower:.2f}x ({_met(slower, FLAT_COST)})")
    if len(middle) > 2:
        first, before = sorted(middle)[-3:-1]
        late, early = marginal_ms(middle, before, last), marginal_ms(middle, first, before)
        shown = f"{late:.3f} / {early:.3f} ms = {late / early:.2f}x ({_met(late / early, FLAT_COST)})"
        lines.append(f"each further image, {before:,} to {last:,} / {first:,} to {before:,}: {shown}")
    if verb == "ingest":
        peak = middle[last]["driver_peak_mib"]
        lines.append(f"driver memory of the ingest of {last:,}: {peak:,.0f} MiB ({_met(peak, INGEST_DRIVER_MIB)})")
    return "\n".join(lines)


def marginal_ms(middle: dict[int, dict[str, float]], fewer: int, more: int) -> float:
    """Milliseconds that each image adds between two sizes: what a command's fixed start cannot hide."""
    return 1_000 * (middle[more]["seconds"] - middle[fewer]["seconds"]) / (more - fewer)


def _met(value: float, goal: float) -> str:
    return f"goal <= {goal:g}, {'met' if value <= goal else 'NOT MET'}"


if __name__ == "__main__":
    main()
