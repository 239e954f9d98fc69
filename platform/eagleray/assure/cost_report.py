"""Costs as blocks of a page: a million images on each kind of node, and which bundle is cheapest that meets the KPI.

Example:
    >>> blocks = list(cost_blocks({"lite0": costs}, meets=("lite0",), kpi="top-1 not really lower", what="scoring"))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from eagleray.assure import report as blocks
from eagleray.assure.cost import Cost, cheapest, dollars


def cost_blocks(
    costs: Mapping[str, Sequence[Cost]], *, meets: Sequence[str], kpi: str, what: str
) -> Iterator[blocks.Block]:
    """The blocks.

    Args:
        costs: Bundle name to its cost on each shape, the same shapes for all.
        meets: Names of the bundles that meet the KPI.
        kpi: What they meet, in words; empty where nothing was asked.
        what: What was measured, in words.
    """
    shown = next(iter(costs.values()), ())
    if not shown:
        return
    rows = []
    for index, cost in enumerate(shown):
        shape = cost.shape
        node = f"{shape.cores} cores" + (f", {shape.num_gpus} x {shape.gpu}" if shape.gpu else "")
        hourly = "–" if shape.usd_per_hour is None else f"${shape.usd_per_hour:.3g}"
        rows.append((shape.name, node, hourly, *(_cell(own[index]) for own in costs.values()), _why(costs, index)))
    best = cheapest(costs, meets=meets)
    found = ""
    if best is not None:
        found = f"Cheapest{f' that meets the KPI ({kpi})' if kpi else ''}: {best.text}. "
    sources = sorted({f"{c.shape.source}, {c.shape.as_of}" for c in shown if c.shape.source})
    note = (
        f"{found}From {what}. Prices are indicative ({'; '.join(sources) or 'none are known'}) and stand in "
        "cluster/profiles.yaml: put your own there."
    )
    yield blocks.Table("Cost of a million images", ("node", "", "an hour", *costs, "rests on"), tuple(rows), note)


def _cell(cost: Cost) -> str:
    """Dollars where the price is known, else hours of the node."""
    if cost.usd_per_million is not None:
        return dollars(cost.usd_per_million)
    return "–" if cost.hours_per_million is None else f"{cost.hours_per_million:.3g} h"


def _why(costs: Mapping[str, Sequence[Cost]], index: int) -> str:
    return "; ".join(dict.fromkeys(own[index].why for own in costs.values()))
