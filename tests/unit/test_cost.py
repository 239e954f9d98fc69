"""Laws of cost: the arithmetic of one hour, twice the cores is half the time, what was not measured has no figure."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
from eagleray.assure import report as blocks
from eagleray.assure.cost import LOCAL, NodeShape, Work, cheapest, dollars, price
from eagleray.assure.cost_report import cost_blocks
from eagleray.core.errors import ConfigError
from eagleray.flows.evaluate_costs import work_of
from eagleray.flows.job import find_recipe
from eagleray.flows.profiles import PROFILES, node_shapes

from tests.conftest import ROOT

HERE = platform.machine()


def shape(name: str = "n", **more: object) -> NodeShape:
    return NodeShape(**{"name": name, "cores": 10, "processor": HERE, "usd_per_hour": 0.5, **more})  # type: ignore[arg-type]


def test_the_arithmetic() -> None:
    found = price(Work(core_s_per_image=0.036), shape())
    assert found.images_per_s == pytest.approx(10 / 0.036)
    assert found.hours_per_million == pytest.approx(1.0)  # a million images x 0.036 s / 10 cores / 3,600
    assert found.usd_per_million == pytest.approx(0.5)


def test_twice_the_cores_at_twice_the_price_cost_the_same_in_half_the_time() -> None:
    one, two = (price(Work(0.02), shape(cores=n, usd_per_hour=n / 10)) for n in (8, 16))
    assert two.usd_per_million == pytest.approx(one.usd_per_million)
    assert two.hours_per_million == pytest.approx((one.hours_per_million or 0) / 2)


@pytest.mark.parametrize(
    ("work", "node", "why"),
    [
        (Work(0.02), shape(processor="z80"), "not measured on z80"),
        (Work(0.02), shape(gpu="L4", num_gpus=1), "not measured on a GPU"),
        (Work(0.02, 0.001, "NVIDIA H100 80GB HBM3"), shape(gpu="L4", num_gpus=1), "not on L4"),
        (Work(0.02, 0.001, "NVIDIA L4"), shape(), "not on CPUs alone"),
        (Work(0.0), shape(), "no image"),
    ],
)
def test_what_was_not_measured_has_no_figure_and_says_so(work: Work, node: NodeShape, why: str) -> None:
    found = price(work, node)
    assert (found.images_per_s, found.usd_per_million) == (None, None)
    assert why in found.why


def test_with_a_gpu_the_slower_half_sets_the_pace() -> None:
    node = shape(gpu="L4", num_gpus=2)
    assert price(Work(0.001, 0.004, "NVIDIA L4"), node).images_per_s == pytest.approx(500)  # two GPUs
    assert price(Work(0.1, 0.004, "NVIDIA L4"), node).images_per_s == pytest.approx(100)  # ten cores that decode


def test_a_node_without_a_price_has_hours_and_no_cost() -> None:
    found = price(Work(0.036), shape(LOCAL, usd_per_hour=None))
    assert found.hours_per_million == pytest.approx(1.0)
    assert found.usd_per_million is None
    assert "price is not known" in found.why


def test_the_cheapest_is_the_least_of_those_that_meet_the_kpi() -> None:
    nodes = (shape("dear", usd_per_hour=9.0), shape("cheap"), shape("unknown", usd_per_hour=None))
    costs = {name: [price(Work(s), node) for node in nodes] for name, s in (("big", 0.1), ("small", 0.01))}
    best = cheapest(costs, meets=("big", "small"))
    assert best is not None
    assert (best.bundle, best.cost.shape.name) == ("small", "cheap")
    only = cheapest(costs, meets=("big",))
    assert only is not None
    assert (only.bundle, only.cost.shape.name) == ("big", "cheap")
    assert cheapest(costs, meets=()) is None


def test_the_page_names_the_cheapest_and_why_there_is_no_figure() -> None:
    nodes = (shape("a"), shape("b", gpu="L4", num_gpus=1))
    costs = {"big": [price(Work(0.1), node) for node in nodes]}
    (table,) = cost_blocks(costs, meets=("big",), kpi="top-1", what="a test")
    assert isinstance(table, blocks.Table)
    assert "Cheapest that meets the KPI (top-1): big on a" in table.note
    assert [row[-2] for row in table.rows] == ["$1.39", "–"]
    assert "not measured on a GPU (L4)" in str(table.rows[1][-1])


def test_dollars_are_read_at_every_size() -> None:
    assert [dollars(x) for x in (None, 0.0123, 0.5, 12.3, 1234.5)] == ["–", "$0.012", "$0.50", "$12.30", "$1,234"]


def test_the_shapes_that_ship_are_whole() -> None:
    shapes = {node.name: node for node in node_shapes()}
    assert shapes[LOCAL].processor == HERE
    priced = [node for node in shapes.values() if node.usd_per_hour is not None]
    assert len(priced) >= 4
    assert all(node.source and node.as_of for node in priced)
    assert any(node.gpu for node in priced)


def test_eagleray_home_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAGLERAY_HOME", str(tmp_path))
    assert LOCAL in {node.name for node in node_shapes()}  # it has none: the checkout's
    (tmp_path / "cluster").mkdir()
    (tmp_path / PROFILES).write_text("schema: 1\nshapes:\n  - {name: mine, cores: 4, usd_per_hour: 1}\n")
    assert [node.name for node in node_shapes()] == ["mine"]
    (tmp_path / PROFILES).write_text("schema: 1\nshapes:\n  - {name: mine, cores: 4, usd_an_hour: 1}\n")
    with pytest.raises(ConfigError, match="shape mine"):
        node_shapes()
    (tmp_path / PROFILES).write_text("schema: 2\nshapes: []\n")
    with pytest.raises(ConfigError, match="no list of node shapes"):
        node_shapes()


def test_a_recipe_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EAGLERAY_HOME", raising=False)
    assert find_recipe("jobs/recipes/evaluate-smoke.yaml") == ROOT / "jobs/recipes/evaluate-smoke.yaml"
    assert find_recipe("jobs/recipes/none.yaml") == Path("jobs/recipes/none.yaml")


def test_the_work_of_a_scoring_run() -> None:
    run = {"inferred": 100, "cpu_s": 2.0, "runtime": {"device": "cpu"}, "workers": [{"seconds": 1.5}]}
    assert work_of(run).core_s_per_image == pytest.approx(0.02)
    assert work_of(run).gpu_s_per_image == 0
    assert work_of({**run, "runtime": {"device": "cuda"}}).gpu_s_per_image == pytest.approx(0.015)
    assert work_of({}).core_s_per_image == 0
