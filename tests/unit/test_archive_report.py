"""Laws of the report of a scored archive: it counts what the manifest lists, once, in any order, whatever the names."""

from __future__ import annotations

import heapq
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eagleray.assure import archive_report, archive_tally, phrases
from eagleray.assure.archive_report import score_report
from eagleray.assure.archive_tally import SHEET_TILES, count_rows
from eagleray.assure.report import Bars, Block, Code, Histogram, Line, Report, Sheet, Table, Totals
from eagleray.core.errors import ArtifactError, DataError

Row = dict[str, Any]


def scored(index: int, score: float | None, *, label: str = "n1", name: str = "cat", id_: str = "") -> Row:
    return {
        "id": id_ or f"{index:064x}",
        "uri": f"file:///photos/{index:06d}.jpg",
        "status": "scored",
        "label": label,
        "label_name": name,
        "score": score,
    }


def refused(index: int, reason: str, detail: str = "") -> Row:
    uri = f"file:///bad/{index:04d}.jpg"
    return {"id": "", "uri": uri, "status": "quarantined", "reason": reason, "detail": detail}


def write_run(
    folder: Path,
    rows: list[Row],
    *,
    part_rows: int = 100,
    run: Row | None = None,
    drop: tuple[str, ...] = (),
    **manifest: Any,
) -> Path:
    (folder / "scores").mkdir(parents=True)
    schema = pa.schema([field for field in archive_tally.SCHEMA if field.name not in drop])
    parts = []
    for start in range(0, max(len(rows), 1), part_rows):
        path = folder / "scores" / f"part-{start:06d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows[start : start + part_rows], schema=schema), path)
        parts.append({"path": f"scores/{path.name}", "rows": len(rows[start : start + part_rows])})
    quarantined = sum(row["status"] == "quarantined" for row in rows)
    head = {"schema": 1, "images_in": len(rows), "scored": len(rows) - quarantined, "quarantined": quarantined}
    text = json.dumps({**head, "model_digest": "9f" * 32, **manifest, "parts": manifest.get("parts", parts)})
    (folder / "_manifest.json").write_text(text)
    if run is not None:
        (folder / "run.json").write_text(json.dumps(run))
    return folder


def block(report: Report, kind: type[Any], title: str = "") -> Any:
    found = [one for one in report.blocks if isinstance(one, kind) and (not title or one.title == title)]
    assert len(found) >= 1, f"no {kind.__name__} {title!r} in {[type(b).__name__ for b in report.blocks]}"
    return found[0]


def mixed_rows(count: int, seed: int = 0) -> list[Row]:
    """Rows with ties, exact duplicates, odd scores, missing names and every reason."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        if rng.random() < 0.05:
            rows.append(refused(index, rng.choice(list(archive_report.REASONS))))
            continue
        score = rng.choice([0.0, 1.0, rng.random(), rng.random(), round(rng.random(), 2), float("nan"), None])
        klass = rng.randrange(60)
        id_ = f"{rng.randrange(count // 3):064x}"
        rows.append(scored(index, score, label=f"n{klass:02d}", name=f"class {klass}" if klass else "", id_=id_))
    return rows


def is_finite(row: Row) -> bool:
    return row["status"] == "scored" and row["score"] is not None and row["score"] == row["score"]


def oracle_best(rows: list[Row], sign: int) -> list[str]:
    """Slow and obvious: sort all, keep the first of each id."""
    keep: dict[str, Row] = {}
    finite = [{**row, "score": float(pa.scalar(row["score"], pa.float32()).as_py())} for row in rows if is_finite(row)]
    for row in sorted(finite, key=lambda r: (-sign * r["score"], r["id"], r["uri"])):
        keep.setdefault(row["id"], row)
    return [row["uri"] for row in list(keep.values())[:SHEET_TILES]]


@pytest.mark.parametrize("batch_rows", [7, 1000, 100_000])
def test_the_streamed_tally_equals_a_slow_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_rows: int
) -> None:
    rows = mixed_rows(3000)
    monkeypatch.setattr(archive_tally, "BATCH_ROWS", batch_rows)
    tally = count_rows(write_run(tmp_path / "run", rows, part_rows=271))
    good = [row for row in rows if row["status"] == "scored"]
    assert tally.scored == len(good)
    assert tally.quarantined == len(rows) - len(good)
    assert tally.odd == sum(not is_finite(row) for row in good)
    assert tally.labels == Counter(row["label"] for row in good)
    assert tally.reasons == Counter(row["reason"] for row in rows if row["status"] == "quarantined")
    assert tally.histogram.sum() == tally.scored - tally.odd
    assert tally.histogram[0] == sum(is_finite(row) and row["score"] < 0.05 for row in rows)
    assert [row.uri for row in tally.most.rows] == oracle_best(rows, 1)
    assert [row.uri for row in tally.least.rows] == oracle_best(rows, -1)
    for reason, kept in tally.refused.items():
        wanted = heapq.nsmallest(SHEET_TILES, (r["uri"] for r in rows if r.get("reason") == reason))
        assert [row.uri for row in kept] == wanted


def test_order_of_rows_and_parts_does_not_change_the_report(tmp_path: Path) -> None:
    rows = mixed_rows(1500)
    first = score_report(write_run(tmp_path / "a" / "run", rows, part_rows=300, run={"ended_at": "x"}))
    random.Random(1).shuffle(rows)
    second = score_report(write_run(tmp_path / "b" / "run", rows, part_rows=77, run={"ended_at": "x"}))
    drop = (Code, Totals)  # they name the folder and the number of parts
    assert [b for b in first.blocks if not isinstance(b, drop)] == [b for b in second.blocks if not isinstance(b, drop)]


def test_a_crowd_of_exact_duplicates_leaves_room_for_other_images(tmp_path: Path) -> None:
    rows = [scored(index, 0.99, id_="f" * 64) for index in range(2000)]
    rows += [scored(5000 + index, 0.5 + index / 1000) for index in range(40)]
    tally = count_rows(write_run(tmp_path / "run", rows))
    assert len({row.id for row in tally.most.rows}) == SHEET_TILES
    assert tally.most.rows[0].uri == "file:///photos/000000.jpg"


def test_no_image_of_a_small_archive_is_on_both_sheets(tmp_path: Path) -> None:
    report = score_report(write_run(tmp_path / "run", [scored(index, index / 30) for index in range(30)]))
    most, least = (one.tiles for one in report.blocks if isinstance(one, Sheet))
    assert (len(most), len(least)) == (SHEET_TILES, 6)
    assert not {tile.uri for tile in most} & {tile.uri for tile in least}


def test_what_the_manifest_does_not_list_does_not_count(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [scored(index, 0.5) for index in range(10)])
    late = pa.Table.from_pylist([scored(99, 0.9)], schema=archive_tally.SCHEMA)
    pq.write_table(late, folder / "scores" / "zombie.parquet")
    assert score_report(folder).verdict.text == "10 images in = 10 scored + 0 quarantined"  # type: ignore[union-attr]


def test_totals_are_an_equation_that_balances(tmp_path: Path) -> None:
    rows = [scored(index, 0.5) for index in range(2012)] + [refused(1, "truncated")]
    report = score_report(write_run(tmp_path / "run", rows))
    assert report.verdict is not None
    assert report.verdict.is_good
    assert report.verdict.text == "2,013 images in = 2,012 scored + 1 quarantined"
    totals = block(report, Totals)
    assert totals.operators == ("=", "+")
    assert [item.value for item in totals.items] == [2013, 2012, 1]


@pytest.mark.parametrize(("images_in", "number_scored"), [(11, 10), (10, 9), (12, 12)])
def test_totals_that_do_not_balance_are_a_failed_verdict(tmp_path: Path, images_in: int, number_scored: int) -> None:
    rows = [scored(index, 0.5) for index in range(10)]
    report = score_report(write_run(tmp_path / "run", rows, images_in=images_in, scored=number_scored))
    assert report.verdict is not None
    assert report.verdict.is_good is False


def test_a_run_without_an_end_or_with_a_lost_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        score_report(tmp_path)
    folder = write_run(tmp_path / "run", [scored(0, 0.5)])
    next((folder / "scores").iterdir()).unlink()
    with pytest.raises(ArtifactError):
        score_report(folder)


@pytest.mark.parametrize(
    "run", [None, {}, {"where": None, "workers": None, "progress": None, "model": {}, "versions": []}]
)
def test_a_poor_run_json_makes_a_poorer_report_not_a_wrong_one(tmp_path: Path, run: Row | None) -> None:
    report = score_report(write_run(tmp_path / "survey", [scored(0, 0.5)], run=run))
    assert report.title == "Scores of survey"
    assert Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report


def test_columns_that_an_older_run_has_not_are_empty(tmp_path: Path) -> None:
    rows = [scored(index, 0.5) for index in range(5)]
    report = score_report(write_run(tmp_path / "run", rows, drop=("decision", "detail", "reason")))
    assert [one.title for one in report.blocks if isinstance(one, Bars)] == ["What was seen"]


def test_all_refused_is_a_report_too(tmp_path: Path) -> None:
    report = score_report(write_run(tmp_path / "run", [refused(index, "empty") for index in range(3)]))
    assert report.verdict is not None
    assert report.verdict.text == "3 images in = 0 scored + 3 quarantined"
    assert not [one for one in report.blocks if isinstance(one, Histogram | Bars)]


def test_all_scores_odd_are_counted_and_drawn_nowhere(tmp_path: Path) -> None:
    report = score_report(write_run(tmp_path / "run", [scored(index, float("nan")) for index in range(3)]))
    assert not [one for one in report.blocks if isinstance(one, Histogram | Sheet)]
    assert block(report, Bars).bars[0].value == 3


def test_classes_beyond_the_largest_are_summed_in_words(tmp_path: Path) -> None:
    rows = [scored(index, 0.5, label=f"n{index % 40:02d}", name=f"class {index % 40}") for index in range(400)]
    bars = block(score_report(write_run(tmp_path / "run", rows)), Bars)
    assert len(bars.bars) == archive_report.TOP_CLASSES
    assert "30 largest of 40 classes" in bars.note
    assert "100 images" in bars.note


def test_every_reason_code_is_explained() -> None:
    from eagleray.vision.images import Reason

    assert set(archive_report.REASONS) == {reason.value for reason in Reason}


def test_quarantined_tiles_take_the_reasons_in_turn_and_mark_what_is_unsafe(tmp_path: Path) -> None:
    rows = [refused(index, "truncated", "ends at byte 9") for index in range(100)] + [refused(200, "poison")]
    report = score_report(write_run(tmp_path / "run", rows))
    tiles = next(one for one in report.blocks if isinstance(one, Sheet)).tiles
    assert len(tiles) == SHEET_TILES
    assert [tile.tag for tile in tiles[:3]] == ["truncated", "poison", "truncated"]
    assert [tile.is_unsafe for tile in tiles[:3]] == [False, True, False]
    assert tiles[0].lines == ("ends at byte 9",)
    assert block(report, Table, "Quarantined").rows[0][:2] == ("truncated", 100)


def test_decisions_are_shown_where_the_bundle_has_thresholds(tmp_path: Path) -> None:
    rows = [{**scored(index, 0.5), "decision": "n1" if index % 3 else "abstain"} for index in range(9)]
    bars = block(score_report(write_run(tmp_path / "run", rows)), Bars, "Decisions")
    assert [(bar.label, bar.value) for bar in bars.bars] == [("cat", 6), ("abstain", 3)]


def line_of(tmp_path: Path, **run: Any) -> Line | None:
    report = score_report(write_run(tmp_path / "run", [scored(0, 0.5)], run=run))
    return next((one for one in report.blocks if isinstance(one, Line)), None)


def test_a_steady_rate_is_a_flat_line(tmp_path: Path) -> None:
    line = line_of(tmp_path, progress=[{"t_s": t / 10, "done": 7 * t} for t in range(500)])
    assert line is not None
    assert len(line.points) <= archive_report.RATE_POINTS + 2
    assert all(abs(rate - 70) < 0.01 for _, rate in line.points)
    assert line.reference == pytest.approx(70)


def test_a_resumed_run_does_not_count_what_was_done_before(tmp_path: Path) -> None:
    samples = [{"t_s": t, "done": 1000 + 10 * t} for t in (1, 2, 2, 3, 4)]  # two samples may share an instant
    line = line_of(tmp_path, progress=samples, workers=[{"images": 40}])
    assert line is not None
    assert line.points[0][0] == 0
    assert line.reference == pytest.approx(10)


@pytest.mark.parametrize(
    "samples",
    [
        [],
        [{"t_s": 1, "done": 5}],
        [{"t_s": 1, "done": 5}] * 9,
        [{"t_s": t, "done": t} for t in range(4)],
        [{"x": 1}] * 9,
    ],
)
def test_too_few_samples_draw_no_line(tmp_path: Path, samples: list[Row]) -> None:
    assert line_of(tmp_path, progress=samples) is None


def test_the_command_is_quoted_so_that_it_can_be_pasted(tmp_path: Path) -> None:
    run = {"command": ["eagleray", "score", "my photos; rm -rf", "--out", "r"]}
    report = score_report(write_run(tmp_path / "run", [scored(0, 0.5)], run=run))
    assert block(report, Code, "How to repeat it").code == "eagleray score 'my photos; rm -rf' --out r"


def test_what_ran_where_and_the_digests_are_named(tmp_path: Path) -> None:
    run = {
        "where": {"mode": "embedded ray", "workers": 2, "nodes": ["n1"]},
        "runtime": {"name": "onnx", "version": "1.27", "precision": "fp32", "device": "cpu"},
        "started_at": "2026-01-31T12:00:00+00:00",
        "workers": [{"pid": 7, "node": "n1", "images": 30, "seconds": 2.0}],
        "config_digest": "c4",
        "image_spec_digest": "1b",
        "source": {"path": "/data/survey.zip", "digest": "77"},
        "model": {"path": "bundles/lite0", "architecture": "tf_efficientnet_lite0"},
    }
    report = score_report(write_run(tmp_path / "run", [scored(0, 0.5)], run=run))
    assert report.title == "Scores of survey.zip"
    assert report.subtitle == "by the model lite0 (tf_efficientnet_lite0)"
    facts = dict(block(report, Table, "What ran where").rows)
    assert facts["Runtime"] == "onnx 1.27 fp32 cpu"
    assert facts["Started"] == "2026-01-31 12:00:00 UTC"
    assert block(report, Table, "Workers").rows == (("7", "n1", 30, 2.0, 15.0),)
    assert dict(block(report, Table, "Digests").rows) == {
        "model": "9f" * 32,
        "preprocessing": "1b",
        "configuration": "c4",
        "input": "77",
    }


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0, 9, "0.0 %"), (9, 9, "100 %"), (2012, 2013, "> 99.9 %"), (1, 10**6, "< 0.1 %"), (1, 3, "33.3 %"), (0, 0, "–")],
)
def test_a_share_says_all_or_none_only_when_it_is(part: int, whole: int, text: str) -> None:
    assert phrases.share(part, whole) == text


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("file:///photos/a b.jpg", "a b.jpg"),
        ("zip://folder/a.jpg::file:///x/archive.zip", "a.jpg"),
        ("tar://m.jpg::file:///x/a.tar", "m.jpg"),
        ("parquet://12::file:///x/shard.parquet", "row 12 of shard.parquet"),
        ("s3://bucket/key/b.png", "b.png"),
        ("", ""),
        ("///", "///"),
    ],
)
def test_a_file_name_is_the_last_part_of_what_was_read(uri: str, name: str) -> None:
    assert phrases.file_name(uri) == name


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123, "12 ms"), (42.34, "42.3 s"), (125, "2 min 5 s"), (11220, "3 h 7 min")]
)
def test_a_duration_is_said_in_the_unit_that_reads_best(seconds: float, text: str) -> None:
    assert phrases.duration(seconds) == text


def test_a_block_of_the_report_is_always_of_a_known_kind(tmp_path: Path) -> None:
    report = score_report(write_run(tmp_path / "run", mixed_rows(200)))
    assert all(isinstance(one, Block) for one in report.blocks)
