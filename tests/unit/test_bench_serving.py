"""The serving benchmark's own arithmetic: the search finds the highest rate, and a lost request is infinitely late."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from bench_serve import FINE, MOST_STEPS, search
from open_loop import Tally, quantile_ms


def server(most: float) -> Any:
    """One whose p99 keeps the limit up to a rate, and which answers nobody above twice that."""
    return lambda rate: {"rate": rate, "p99_ms": None if rate > 2 * most else 50.0 if rate <= most else 500.0}


@pytest.mark.parametrize("start", [20.0, 95.0, 100.0, 104.0, 180.0, 300.0])
@pytest.mark.parametrize("most", [60.0, 100.0, 250.0])
def test_the_highest_rate_is_found_to_five_in_a_hundred(start: float, most: float) -> None:
    best, steps = search(server(most), start, 100.0)
    near = 0.5 <= start / most <= 2.0  # as the capacity that was measured before, or the round before, gives it
    assert steps <= MOST_STEPS
    if near:
        assert most / FINE <= best["rate"] <= most
    elif best:
        assert best["rate"] <= most


def test_a_server_that_never_keeps_the_limit_has_no_rate() -> None:
    best, steps = search(lambda rate: {"rate": rate, "p99_ms": None}, 50.0, 100.0)
    assert best == {}
    assert steps <= MOST_STEPS


def test_a_machine_that_stood_still_once_is_not_the_limit() -> None:
    calls: list[float] = []

    def measure(rate: float) -> dict[str, float]:
        calls.append(rate)
        return {"rate": rate, "p99_ms": 900.0 if len(calls) == 1 or rate > 100 else 50.0}

    best, _ = search(measure, 95.0, 100.0)
    assert calls[0] == calls[1] == 95.0
    assert best["rate"] >= 95.0


def test_a_request_without_an_answer_is_infinitely_late() -> None:
    tally = Tally(sent=100)
    tally.answers = [(1.0, 0.01)] * 98
    figures = tally.figures(start=0.0, seconds=2.0, cpu_s=0.1)
    assert figures["p50_ms"] == pytest.approx(10.0)
    assert figures["p99_ms"] is None  # two of a hundred never came: the 99th of them is infinite
    assert figures["accepted_p99_ms"] == pytest.approx(10.0)


def test_quantiles_are_the_slow_ones() -> None:
    values = [float(number) for number in range(1, 201)]
    assert quantile_ms(values, 0.99) == 198_000
    assert sum(value <= 198 for value in values) / 200 >= 0.99 > sum(value <= 197 for value in values) / 200
    assert quantile_ms([], 0.5) is None
    assert quantile_ms([math.inf], 0.5) is None


def test_only_answers_within_the_window_are_goodput() -> None:
    tally = Tally(sent=4)
    tally.answers = [(0.2, 0.1), (1.0, 0.1), (1.9, 0.1), (2.4, 0.1)]  # the first while it fills, the last after the end
    assert tally.figures(start=0.0, seconds=2.0, cpu_s=0.0)["answered_per_s"] == pytest.approx(2 / 1.5)
