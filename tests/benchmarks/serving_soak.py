"""Half the load for half an hour: whether a replica's memory grows, and whether any request fails."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from model_maker import Model
from serving_contestants import Contestant, serving

STEP_S = 30.0
SETTLED_AFTER_S = 120.0  # allocators and caches have grown to their size
GROWTH_GOAL = 0.02


def soak(
    contestant: Contestant, model: Model, folder: Path, work: Path, *, rate: float, minutes: float
) -> dict[str, Any]:
    """Sends at a fixed rate and looks at the replicas every half minute.

    Args:
        contestant: Who serves.
        model: What.
        folder: Of pictures.
        work: For logs.
        rate: Requests per second.
        minutes: How long.

    Returns:
        The figures: ``growth`` is the median of the last five samples of the resident size over that of the first five
        after it has settled, less 1.
    """
    picture = next(iter(sorted(folder.rglob("*.jpg")))).read_bytes()
    statuses: Counter[str] = Counter()
    samples: list[dict[str, float]] = []
    sent, worst_ms = 0, 0.0
    with serving(contestant, model, picture, work) as server, server.load(folder, 200, 2_000) as load:
        begin = time.time()
        while time.time() - begin < minutes * 60:
            told = load.open(rate, STEP_S)
            sent += told["sent"]
            statuses.update(told["statuses"])
            worst_ms = max(worst_ms, told["accepted_p99_ms"] or 0.0)
            mib = sum(each.memory_info().rss for each in server.replicas()) / 2**20
            samples.append({"t_s": round(time.time() - begin, 1), "rss_mib": round(mib, 1)})
            print(f"#   soak {samples[-1]} {dict(statuses)} worst p99 {worst_ms:.0f} ms", flush=True)
    settled = [each["rss_mib"] for each in samples if each["t_s"] >= SETTLED_AFTER_S] or [
        each["rss_mib"] for each in samples
    ]
    few = min(5, max(1, len(settled) // 2))
    first, last = sorted(settled[:few])[few // 2], sorted(settled[-few:])[few // 2]
    growth = last / first - 1
    failed = sent - statuses["200"]
    return {
        "rate": rate,
        "minutes": round((samples[-1]["t_s"]) / 60, 1),
        "sent": sent,
        "failed": failed,
        "statuses": dict(statuses),
        "worst_p99_ms": worst_ms,
        "rss_mib_first": first,
        "rss_mib_last": last,
        "growth": growth,
        "met": growth < GROWTH_GOAL and failed == 0,
        "samples": samples,
    }
