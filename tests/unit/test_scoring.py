"""Laws of one unit: a row for each uri, duplicates inferred once, a refusal costs itself, care from attempt three."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eagleray.core.commits import Ledger
from eagleray.core.errors import ArtifactError
from eagleray.infer.classifier import Classifier
from eagleray.infer.scoring import ScoreSettings, ShardScorer
from eagleray.vision import sources
from eagleray.vision.bundle import load_bundle
from eagleray.vision.inputs import freeze_listing


@pytest.fixture
def photos(tmp_path: Path, make_photo: Callable[..., bytes]) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.jpg").write_bytes(make_photo(number))
    (folder / "copy.jpg").write_bytes(make_photo(3))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "broken.jpg").write_bytes(make_photo(5)[:700])
    (folder / "broken copy.jpg").write_bytes(make_photo(5)[:700])
    return folder


def settings(run: Path, model: Path, **changes: Any) -> dict[str, Any]:
    bundle = load_bundle(model)
    base = ScoreSettings(
        root=str(run), key="k", bundle=str(model), model_digest=bundle.model_digest, runtime="onnx", batch_size=8
    )
    return dataclasses.asdict(dataclasses.replace(base, memory_mib=0, **changes))


def score_folder(folder: Path, run: Path, model: Path, **changes: Any) -> tuple[pa.Table, list[dict[str, Any]]]:
    frozen = freeze_listing(str(folder), sources.list_items(str(folder)), run / "input")
    ledger = Ledger(run, "k").open()
    scorer = ShardScorer(settings(run, model, **changes))
    answers = [scorer(unit) for unit in frozen.units]
    parts = [run / part["path"] for part in ledger.committed().values()]
    return pa.concat_tables([pq.read_table(part) for part in parts]).sort_by("uri"), answers


def test_a_row_for_each_uri_and_the_same_answers_as_predict(photos: Path, tmp_path: Path, tiny_model: Path) -> None:
    table, answers = score_folder(photos, tmp_path / "run", tiny_model)
    rows = {row["uri"].rsplit("/", 1)[1]: row for row in table.to_pylist()}
    files = sorted(photos.iterdir())
    assert sorted(rows) == [path.name for path in files]
    predictions = Classifier(tiny_model, "onnx", top_k=5).predict([path.read_bytes() for path in files])
    for path, prediction in zip(files, predictions, strict=True):
        row = rows[path.name]
        assert (row["status"], row["reason"], row["label"]) == (
            prediction.status,
            prediction.reason,
            prediction.label,
        )
        if prediction.score is not None:
            assert row["score"] == pytest.approx(prediction.score, abs=1e-6)
            assert row["topk_labels"] == [label for label, _ in prediction.topk]
    assert {name: rows[name]["reason"] for name in ("empty.jpg", "broken.jpg", "broken copy.jpg")} == {
        "empty.jpg": "empty",
        "broken.jpg": "truncated",
        "broken copy.jpg": "truncated",
    }
    assert sum(answer["scored"] for answer in answers) == 41
    assert sum(answer["quarantined"] for answer in answers) == 3


def test_an_exact_duplicate_is_inferred_once_and_has_a_row_for_each_uri(
    photos: Path, tmp_path: Path, tiny_model: Path
) -> None:
    table, answers = score_folder(photos, tmp_path / "run", tiny_model)
    rows = {row["uri"].rsplit("/", 1)[1]: row for row in table.to_pylist()}
    assert rows["copy.jpg"]["id"] == rows["03.jpg"]["id"]
    assert rows["copy.jpg"]["score"] == rows["03.jpg"]["score"]
    assert sum(answer["inferred"] for answer in answers) == 40


def test_the_third_attempt_is_careful_and_gives_the_same(photos: Path, tmp_path: Path, tiny_model: Path) -> None:
    plain, _ = score_folder(photos, tmp_path / "plain", tiny_model)
    frozen = freeze_listing(str(photos), sources.list_items(str(photos)), tmp_path / "run" / "input")
    ledger = Ledger(tmp_path / "run", "k").open()
    for unit in frozen.units:
        ledger.begin(unit["unit"]), ledger.begin(unit["unit"])
    careful, answers = score_folder(photos, tmp_path / "run", tiny_model)
    assert {answer["attempt"] for answer in answers} == {3}
    assert careful.equals(plain)


def test_a_committed_unit_that_is_given_out_again_is_not_scored_again(
    photos: Path, tmp_path: Path, tiny_model: Path
) -> None:
    first, answers = score_folder(photos, tmp_path / "run", tiny_model)
    again, told = score_folder(photos, tmp_path / "run", tiny_model)
    assert again.equals(first)
    assert set(Ledger(tmp_path / "run", "k").attempts().values()) == {1}
    for was, now in zip(answers, told, strict=True):
        assert {**was, "is_mine": False} == {**now, "ended": was["ended"]}  # a part says when it was written


def test_embeddings_are_float16_of_fixed_size_and_null_where_nothing_was_scored(
    photos: Path, tmp_path: Path, tiny_model: Path
) -> None:
    table, _ = score_folder(photos, tmp_path / "run", tiny_model, has_embeddings=True)
    dim = load_bundle(tiny_model).embedding_dim
    assert table.schema.field("embedding").type == pa.list_(pa.float16(), dim)
    by_status = {"scored": set(), "quarantined": set()}
    for row in table.select(["status", "embedding"]).to_pylist():
        by_status[row["status"]].add(row["embedding"] is None)
    assert by_status == {"scored": {False}, "quarantined": {True}}
    vectors = [row for row in table["embedding"].to_pylist() if row is not None]
    assert np.isfinite(np.array(vectors, np.float32)).all()


def test_a_unit_that_lost_items_takes_the_rows_of_its_ancestor(photos: Path, tmp_path: Path, tiny_model: Path) -> None:
    before, _ = score_folder(photos, tmp_path / "run", tiny_model)
    (photos / "07.jpg").unlink()
    frozen = freeze_listing(str(photos), sources.list_items(str(photos)), tmp_path / "run" / "input")
    ledger = Ledger(tmp_path / "run", "k")
    done = ledger.committed()
    (unit,) = [unit for unit in frozen.units if unit["unit"] not in done]
    scorer = ShardScorer(settings(tmp_path / "run", tiny_model))
    answer = scorer({**unit, "reuse": done[unit["derived_from"]]["path"]})
    assert answer["inferred"] == 0
    part = pq.read_table(tmp_path / "run" / ledger.committed()[unit["unit"]]["path"]).to_pylist()
    old = {row["uri"]: row for row in before.to_pylist()}
    assert part == [old[row["uri"]] for row in part]
    assert len(part) == done[unit["derived_from"]]["rows"] - 1


def test_bytes_that_changed_since_ingest_are_refused(tmp_path: Path, tiny_model: Path, make_photo: Any) -> None:
    shard = tmp_path / "shard.parquet"
    table = pa.table({"id": ["0" * 64], "uri": ["file:///a.jpg"], "image": pa.array([make_photo(1)], pa.binary())})
    pq.write_table(table, shard)
    unit = {"unit": "u", "kind": "corpus", "path": str(shard), "first_group": 0, "num_groups": 1, "images": 1}
    Ledger(tmp_path, "k").open()
    answer = ShardScorer(settings(tmp_path, tiny_model))({**unit, "derived_from": ""})
    assert (answer["scored"], answer["quarantined"]) == (0, 1)
    with pytest.raises(ArtifactError, match="holds 1 images"):
        ShardScorer(settings(tmp_path, tiny_model))({**unit, "unit": "v", "images": 2, "derived_from": ""})


def test_a_bundle_that_changed_under_the_run_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ArtifactError, match="has changed since the run began"):
        ShardScorer({**settings(tmp_path, tiny_model), "model_digest": "0" * 64})
