"""Views per CPU-second: ours beside lightly's transforms in a torch DataLoader, from encoded bytes to float batches.

Both sides get the same images in memory, give the same views (224 px; DINO 2 of 224 and 6 of 96), batches of 64, and
one thread for torch. CPU-seconds are those of the process and its loader's workers. lightly's number of workers is
swept first and its best is used. A round runs both, one after the other, beginning with the other one each time; quoted
is the median over rounds of the ratio within a round, with its least and most.

Example:
    python tests/benchmarks/bench_views.py                       # about two minutes
    python tests/benchmarks/bench_views.py --rounds 1 --images 64 --methods dino
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from bench_score import describe_machine
from checkout import ROOT
from eagleray.learn.selfsup.photometric import Photometric
from eagleray.learn.selfsup.views import ViewPlan, ViewTransform, byol_plan, dino_plan, simclr_plan
from eagleray.learn.task import Item
from eagleray.vision import resample

sys.path.insert(0, str(Path(__file__).parent / "peers"))

import lightly_loader

BATCH = 64
PLANS = {"simclr": simclr_plan(224), "byol": byol_plan(224), "dino": dino_plan(224, 96, 6)}
GOALS = {"simclr": 3.0, "dino": 4.0}  # issue 3, Speed


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, default=ROOT.parent / "shared" / "data" / "imagenet250.zip")
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", default="simclr,byol,dino")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("/tmp/eagleray-bench/bench_views.json"))
    return parser.parse_args(argv)


class Ours:
    """ViewTransform and Photometric, one after the other, in this process."""

    def __init__(self, encoded: list[bytes], plan: ViewPlan) -> None:
        self.items = [Item(hashlib.sha256(data).hexdigest(), data) for data in encoded]
        self.transform, self.photometric = ViewTransform(plan), Photometric(plan)

    def epoch(self, number: int) -> Iterator[list[torch.Tensor]]:
        """Batches as lightly's loader gives them."""
        for first in range(0, len(self.items), BATCH):
            arrays = self.transform(self.items[first : first + BATCH], number)
            yield self.photometric({name: torch.from_numpy(array) for name, array in arrays.items()}, number)


def read(archive: Path, count: int) -> list[bytes]:
    """The first images of a zip."""
    with zipfile.ZipFile(archive) as opened:
        names = sorted(name for name in opened.namelist() if name.lower().endswith((".jpg", ".jpeg", ".png")))
        step = max(1, len(names) // count)
        return [opened.read(name) for name in names[::step][:count]]


def cpu_s() -> float:
    """CPU-seconds so far of this process and its children that live."""
    tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in tree)


def measure(epoch: Callable[[int], Iterator[list[torch.Tensor]]], number: int) -> dict[str, float]:
    """One epoch: views per CPU-second and per second."""
    views, began, cpu = 0, time.perf_counter(), cpu_s()
    for batch in epoch(number):
        views += sum(len(view) for view in batch)
    seconds, cpu = time.perf_counter() - began, cpu_s() - cpu
    return {"views": views, "cpu_s": cpu, "per_cpu_s": views / cpu, "per_s": views / seconds}


def best_loader(encoded: list[bytes], method: str) -> tuple[lightly_loader.Loader, dict[str, int]]:
    """lightly's loader with the number of workers that does most per CPU-second, over a part of the images."""
    found = []
    for options in lightly_loader.CANDIDATES:
        loader = lightly_loader.Loader(encoded[: 2 * BATCH], method, BATCH, **options)
        measure(loader.epoch, 0)
        found.append((measure(loader.epoch, 1)["per_cpu_s"], options))
        print(f"#   {method}: lightly with {options}: {found[-1][0]:.0f} views per CPU-second", flush=True)
    options = max(found, key=lambda row: row[0])[1]
    return lightly_loader.Loader(encoded, method, BATCH, **options), options


def contest(encoded: list[bytes], method: str, rounds: int) -> dict[str, Any]:
    """Both sides, in turns."""
    loader, options = best_loader(encoded, method)
    sides = {"eagleray": Ours(encoded, PLANS[method]).epoch, "lightly": loader.epoch}
    for epoch in sides.values():
        measure(epoch, 0)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(1, rounds + 1):
        for name in sorted(sides, reverse=number % 2 == 0):
            runs[name].append(measure(sides[name], number))
        last = {name: round(rows[-1]["per_cpu_s"]) for name, rows in runs.items()}
        print(f"#   round {number} {method}: {json.dumps(last)}", flush=True)
    return {"options": options, "runs": runs}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Medians, and the ratio within a round."""
    lines = [
        "| views per CPU-second | eagleray | lightly (workers) | ratio, median (least to most) | goal |",
        "|---|---|---|---|---|",
    ]
    for method, contest_ in found.items():
        ours, theirs = ([row["per_cpu_s"] for row in contest_["runs"][name]] for name in ("eagleray", "lightly"))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        ratio, goal = statistics.median(ratios), GOALS.get(method)
        shown = "" if goal is None else f">= {goal:g}: {'met' if ratio >= goal else 'NOT MET'}"
        lines.append(
            f"| {method} | {statistics.median(ours):,.0f} | {statistics.median(theirs):,.0f} "
            f"({contest_['options']['num_workers']}) | {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {shown} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every method and prints the table."""
    args = parse(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    torch.set_num_threads(1)
    encoded = read(args.archive, args.images)
    machine = {
        **describe_machine(args),
        **{name: metadata.version(name) for name in ("torch", "torchvision", "lightly")},
        "kernel": resample.kernel(),
        "images": f"{len(encoded)} of {args.archive.name}, {sum(map(len, encoded)) / len(encoded) / 1000:.0f} KB each",
    }
    print("\n".join(f"# {name}: {value}" for name, value in machine.items()), flush=True)
    found = {method: contest(encoded, method, args.rounds) for method in args.methods.split(",")}
    print(table(found), flush=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"machine": machine, "contests": found}, indent=1) + "\n")
    print(f"\n# every figure in {args.json}")


if __name__ == "__main__":
    main()
