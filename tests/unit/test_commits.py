"""Laws of the ledger: one winner a unit, a manifest that balances or is absent, readers that see listed parts only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eagleray.core import commits, storage
from eagleray.core.commits import Ledger
from eagleray.core.errors import ArtifactError, DataError, RunIncomplete


def write_part(ledger: Ledger, unit: str, rows: int = 3) -> dict[str, Any]:
    path = ledger.new_part(unit, "scores")
    pq.write_table(pa.table({"uri": [f"{unit}/{n}" for n in range(rows)]}), path)
    return {
        "path": f"scores/{path.name}",
        "rows": rows,
        "scored": rows,
        "quarantined": 0,
        "bytes": path.stat().st_size,
        "sha256": storage.sha256_file(path),
    }


def seal(root: Path, ledger: Ledger, **changes: int) -> dict[str, Any]:
    parts = list(ledger.committed().values())
    rows = sum(part["rows"] for part in parts)
    return commits.seal(root, {"images_in": rows, "scored": rows, "quarantined": 0, **changes}, parts)


def test_attempts_count_up_and_survive_the_process(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "k" * 64).open()
    assert [ledger.begin("u1"), ledger.begin("u1"), ledger.begin("u2")] == [1, 2, 1]
    assert Ledger(tmp_path, "k" * 64).begin("u1") == 3
    assert ledger.attempts() == {"u1": 3, "u2": 1}


def test_a_unit_is_given_up_after_many_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "MAX_ATTEMPTS", 2)
    ledger = Ledger(tmp_path, "k").open()
    ledger.begin("u1"), ledger.begin("u1")
    with pytest.raises(RunIncomplete, match="failed 2 times"):
        ledger.begin("u1")


def test_the_second_commit_of_a_unit_loses_and_leaves_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "k").open()
    first, second = write_part(ledger, "u1"), write_part(ledger, "u1", rows=5)
    assert ledger.commit("u1", first)
    assert not ledger.commit("u1", second)
    assert ledger.committed()["u1"]["path"] == first["path"]
    assert not (tmp_path / second["path"]).exists()


def test_results_under_another_key_are_not_seen(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "model-a").open()
    ledger.commit("u1", write_part(ledger, "u1"))
    assert Ledger(tmp_path, "model-b").open().committed() == {}


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_commit_without_its_whole_part_does_not_count(tmp_path: Path, damage: str) -> None:
    ledger = Ledger(tmp_path, "k").open()
    part = write_part(ledger, "u1")
    ledger.commit("u1", part)
    path = tmp_path / part["path"]
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-1])
    assert ledger.committed() == {}
    assert ledger.commit("u1", write_part(ledger, "u1"))  # and can be done again


def test_readers_see_listed_parts_only(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "k").open()
    ledger.commit("u1", write_part(ledger, "u1"))
    zombie = write_part(ledger, "u1", rows=7)  # written, never committed
    manifest = seal(tmp_path, ledger)
    assert commits.open_scores(tmp_path).count_rows() == 3
    assert commits.collect_garbage(tmp_path, "scores", manifest) == 1
    assert not (tmp_path / zombie["path"]).exists()
    assert commits.open_scores(tmp_path).count_rows() == 3


@pytest.mark.parametrize("changes", [{"images_in": 4}, {"scored": 2}, {"quarantined": 1}])
def test_a_manifest_that_does_not_balance_is_not_written(tmp_path: Path, changes: dict[str, int]) -> None:
    ledger = Ledger(tmp_path, "k").open()
    ledger.commit("u1", write_part(ledger, "u1"))
    with pytest.raises(RunIncomplete, match="images in"):
        seal(tmp_path, ledger, **changes)
    assert not (tmp_path / commits.MANIFEST).exists()


def test_the_part_that_does_not_balance_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "k").open()
    ledger.commit("u7", {**write_part(ledger, "u7"), "scored": 2})
    with pytest.raises(RunIncomplete, match="u7"):
        seal(tmp_path, ledger)


def test_open_scores_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished run"):
        commits.open_scores(tmp_path)
    ledger = Ledger(tmp_path, "k").open()
    part = write_part(ledger, "u1")
    ledger.commit("u1", part)
    seal(tmp_path, ledger)
    (tmp_path / part["path"]).unlink()
    with pytest.raises(ArtifactError, match="missing"):
        commits.open_scores(tmp_path)
    storage.write_json(tmp_path / commits.MANIFEST, {"schema": 99, "parts": []})
    with pytest.raises(ArtifactError, match="schema 99"):
        commits.open_scores(tmp_path)
    (tmp_path / commits.MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match="not JSON"):
        commits.open_scores(tmp_path)


def test_parts_are_read_one_by_one_as_the_dataset_has_them(tmp_path: Path) -> None:
    paths = []
    for number in range(3):
        path = tmp_path / "scores" / f"part-{number}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"id": [f"{number}a", f"{number}b"], "score": [0.1, 0.2]}), path)
        paths.append(path)
    parts = [
        {"unit": str(at), "path": f"scores/{path.name}", "rows": 2, "scored": 2, "quarantined": 0}
        for at, path in enumerate(paths[:2])
    ]
    commits.seal(tmp_path, {"images_in": 4, "scored": 4, "quarantined": 0}, parts)
    tables = list(commits.read_parts(tmp_path, ["id", "a column of a newer version"]))
    assert [table.column_names for table in tables] == [["id"], ["id"]]
    assert pa.concat_tables(tables) == commits.open_scores(tmp_path).to_table(columns=["id"])
