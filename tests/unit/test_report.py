"""Laws of the Report noun: it goes to JSON and back whole, and what does not hold together is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from eagleray.assure.report import (
    KINDS,
    SCHEMA,
    Bar,
    Bars,
    Block,
    Code,
    Curve,
    Curves,
    Heatmap,
    Histogram,
    Interval,
    Intervals,
    Line,
    Mark,
    Report,
    Scatter,
    Sheet,
    Table,
    Text,
    Tile,
    Total,
    Totals,
    Verdict,
)
from eagleray.core.errors import ArtifactError

SAMPLES: dict[str, Block] = {
    "totals": Totals((Total("in", 3, "all", "good"), Total("a", 2.5), Total("b", "two")), ("=", "+"), "Sum", "note"),
    "table": Table("T", ("name", "count", "x"), (("a", 1, None), ("b", 2.0, "é\n")), "note", (0,), True, 3),
    "bars": Bars("B", (Bar("cat", 3.0, "n01"), Bar("dog", 0.0)), "images", 3.0, "note"),
    "histogram": Histogram("H", (0.0, 0.5, 1.0), (3, 9), "score", "images", "note"),
    "line": Line("L", ((0.0, 1.0), (2.0, 3.5)), "t", "n", "s", 2.0, "mean", "note"),
    "curves": Curves("C", (Curve("a", ((0.0, 1.0), (0.5, 0.2))), Curve("b", ())), "x", "y", True, True, True, "note"),
    "heatmap": Heatmap("M", ("a", "b"), ("a", "b", "c"), ((3, 0, 1), (0, 2, 0)), "truth", "answer", "note"),
    "intervals": Intervals(
        "I", (Interval("a", 0.5, 0.4, 0.6, "n", True), Interval("b", 1)), "x", 0.5, "all", 2, "note"
    ),
    "scatter": Scatter(
        "S", (Mark("a", 1.0, 0.5, 0.4, 0.6, False), Mark("b", 2.0, 1.0)), "ms", "top-1", 0.4, "gate", "n"
    ),
    "sheet": Sheet("S", (Tile("file:///a", ("x", "y"), "a", "data:image/png;base64,AA==", "0.9", True),), "note"),
    "code": Code("C", "line 1\nline 2", "note"),
    "text": Text(("one", "two"), "title"),
}


def make_report(*blocks: Block) -> Report:
    return Report("title", "2026-01-31T12:00:00Z", blocks, "subtitle", Verdict("holds", is_good=True))


def test_every_kind_has_a_sample() -> None:
    assert SAMPLES.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_survives_json(kind: str) -> None:
    report = make_report(SAMPLES[kind], SAMPLES[kind])
    assert Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report


def test_a_report_of_all_kinds_and_of_none_survives_json() -> None:
    for report in (make_report(*SAMPLES.values()), make_report(), Report("t", "c", (), verdict=None)):
        assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_defaults_may_be_absent_from_a_file() -> None:
    data = {"schema": 1, "title": "t", "created": "c", "blocks": [{"kind": "code", "title": "x", "code": "y"}]}
    assert Report.from_json(data) == Report("t", "c", (Code("x", "y"),), schema=1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_cannot_hold_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        make_report(Bars("b", (Bar("x", value),))).to_json()


def test_a_newer_schema_is_refused_with_what_to_do() -> None:
    with pytest.raises(ArtifactError, match="newer eagleray"):
        Report.from_json({**make_report().to_json(), "schema": SCHEMA + 1})


@pytest.mark.parametrize(
    "change",
    [
        {"blocks": [{"kind": "script", "code": "x"}]},
        {"blocks": [{"title": "no kind"}]},
        {"blocks": ["text"]},
        {"blocks": 3},
        {"blocks": [{"kind": "code", "title": "x"}]},
        {"blocks": [{"kind": "code", "title": "x", "code": 3}]},
        {"blocks": [{"kind": "code", "title": "x", "code": "y", "more": 1}]},
        {"blocks": [{"kind": "line", "title": "x", "points": [[0.0]]}]},
        {"blocks": [{"kind": "curves", "title": "x", "curves": [{"label": "a", "points": [[1.0, 0.0], [0.0, 0.0]]}]}]},
        {"blocks": [{"kind": "heatmap", "title": "x", "rows": ["a"], "columns": ["a"], "counts": [[1, 2]]}]},
        {"blocks": [{"kind": "table", "title": "x", "columns": ["a"], "rows": [["1", "2"]]}]},
        {"blocks": [{"kind": "sheet", "title": "x", "tiles": [{"uri": "a", "image": "https://x/y.jpg"}]}]},
        {"title": None},
        {"verdict": "yes"},
        {"schema": "1"},
        {"surplus": 1},
    ],
)
def test_what_does_not_hold_together_is_an_artifact_error(change: dict[str, object]) -> None:
    with pytest.raises(ArtifactError):
        Report.from_json({**make_report().to_json(), **change})


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_what_is_no_object_is_an_artifact_error(value: object) -> None:
    with pytest.raises(ArtifactError):
        Report.from_json(value)


def test_blocks_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match="signs"):
        Totals((Total("a", 1), Total("b", 2)), ("=", "+"))
    with pytest.raises(ValueError, match="cells"):
        Table("t", ("a", "b"), (("1",),))
    with pytest.raises(ValueError, match="ascending"):
        Histogram("h", (0.0, 1.0, 0.5), (1, 2))
    with pytest.raises(ValueError, match="ascend"):
        Line("l", ((1.0, 0.0), (0.0, 0.0)))
    with pytest.raises(ValueError, match="ascend"):
        Curve("c", ((1.0, 0.0), (0.0, 0.0)))
    with pytest.raises(ValueError, match="at most"):
        Curves("c", (Curve("a", ()),) * 7)
    with pytest.raises(ValueError, match="rows of"):
        Heatmap("h", ("a",), ("b",), ((1,), (2,)))


@pytest.mark.parametrize(
    "image", ["https://example.com/a.jpg", "file:///a.jpg", "javascript:alert(1)", "data:text/html,x"]
)
def test_a_tile_holds_its_picture_or_none(image: str) -> None:
    with pytest.raises(ValueError, match="data:image/"):
        Tile("file:///a", image=image)


def test_a_report_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_report().title = "other"  # type: ignore[misc]
