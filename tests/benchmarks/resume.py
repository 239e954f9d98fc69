"""What a resume does again: the driver is killed (-9) when half of the images are committed, then runs once more.

Counted from the run's own ledger: a unit with two attempts was begun before the kill and done again after it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from contestants import TIMEOUT_S, Ours, metered, running
from model_maker import Model

POLL_S = 0.02
GONE_S = 10.0  # workers end within 3 s; two agents of Ray outlive their raylet for ever, do nothing, and are ended here


def resume_after_kill(model: Model, archive: Path, work: Path, rounds: int) -> list[dict[str, Any]]:
    """Kills and resumes `rounds` times, each in a fresh folder; one dict of counts a round."""
    return [_once(model, archive, work / f"resume-{number}") for number in range(rounds)]


def _once(model: Model, archive: Path, out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    total = sum(1 for _ in archive.rglob("*.jpg"))
    command = Ours(out.parent).command(model, archive, out)
    with running(command, out.with_suffix(".log")) as process:
        deadline = time.monotonic() + TIMEOUT_S
        while sum(_committed(out).values()) < total / 2:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the run ended before half was committed: {out.with_suffix('.log')}")
            time.sleep(POLL_S)
        descendants = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        _, left = psutil.wait_procs(descendants, timeout=GONE_S)
    for survivor in left:
        survivor.kill()
    before = _committed(out)
    _, cost = metered(command, out.with_suffix(".resume.log"))
    attempts = _attempts(out)
    after = _committed(out)
    names = _names(out)
    again = [unit for unit, count in attempts.items() if count > 1]
    told = json.loads((out / "run.json").read_bytes())
    return {
        "images": total,
        "committed": sum(before.values()),
        "processes_left_behind": len(left),
        "committed_lost": sum(rows for unit, rows in before.items() if after.get(unit) != rows),
        "units_again": len(again),
        "images_again": sum(after[unit] for unit in again),
        "workers": told["where"]["workers"],
        "seconds": cost.seconds,
        "rows": sum(names.values()),
        "distinct": len(names),
    }


def _committed(out: Path) -> dict[str, int]:
    """Rows by committed unit."""
    return {path.stem: json.loads(path.read_bytes())["rows"] for path in out.glob("_ledger/*/parts/[!.]*.json")}


def _attempts(out: Path) -> Counter[str]:
    return Counter(path.name.rpartition(".")[0] for path in out.glob("_ledger/*/attempts/*"))


def _names(out: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    for part in json.loads((out / "_manifest.json").read_bytes())["parts"]:
        found.update(pq.read_table(out / part["path"], columns=["uri"])["uri"].to_pylist())
    return found
