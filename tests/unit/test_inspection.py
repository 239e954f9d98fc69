"""inspect: what a thing on disk is, and that a flipped byte is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eagleray.core import storage
from eagleray.core.errors import ArtifactError, DataError
from eagleray.core.records import Record
from eagleray.flows import inspection
from eagleray.flows.inspection import describe


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """A finished run of two parts."""
    root = tmp_path / "run"
    (root / "scores").mkdir(parents=True)
    parts = []
    for number, rows in enumerate((2, 1)):
        path = root / "scores" / f"part-{number}.parquet"
        pq.write_table(pa.table({"uri": [f"file:///{number}-{row}.jpg" for row in range(rows)]}), path)
        size = path.stat().st_size
        name = path.relative_to(root).as_posix()
        parts.append({"path": name, "rows": rows, "bytes": size, "sha256": storage.sha256_file(path)})
    totals = {"images_in": 3, "scored": 2, "quarantined": 1, "model_digest": "ab" * 32}
    storage.write_json(root / "_manifest.json", {"schema": 1, **totals, "parts": parts})
    storage.write_json(
        root / "run.json", {"schema": 1, "state": "finished", "runtime": {"name": "onnx"}, "seconds": 1.5}
    )
    pq.write_table(pa.table({"uri": ["a"], "reason": ["truncated"]}), root / "quarantine.parquet")
    record = Record(kind="score", subjects={p["path"]: p["sha256"] for p in parts}, inputs={"model": "ab" * 32})
    storage.write_json(root / "record.json", record.to_json())
    return root


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_scores_are_counted_and_every_part_is_verified(scores: Path) -> None:
    said = describe(scores)
    assert (said["kind"], said["state"], said["images_in"], said["rows"]) == ("scores", "finished", 3, 3)
    assert said["reasons"] == {"truncated": 1}
    assert said["verified"] == {"by_digest": 2, "by_size": 0}
    json.dumps(said)


def test_a_flipped_byte_of_a_part_is_found_by_name(scores: Path) -> None:
    flip(scores / "scores" / "part-1.parquet")
    with pytest.raises(ArtifactError, match=r"part-1\.parquet has changed"):
        describe(scores)


def test_a_missing_or_cut_part_is_found(scores: Path) -> None:
    part = scores / "scores" / "part-0.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"part-0\.parquet is .* bytes, not"):
        describe(scores)
    part.unlink()
    with pytest.raises(ArtifactError, match=r"part-0\.parquet is missing"):
        describe(scores)


def test_a_large_part_is_verified_by_its_size(scores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "SMALL_BYTES", 10)
    assert describe(scores)["verified"] == {"by_digest": 0, "by_size": 2}


def test_a_record_that_says_otherwise_than_the_manifest_is_refused(scores: Path) -> None:
    statement = json.loads((scores / "record.json").read_text())
    statement["subject"][0]["digest"]["sha256"] = "0" * 64
    (scores / "record.json").write_text(json.dumps(statement))
    with pytest.raises(ArtifactError, match="says otherwise"):
        describe(scores)


def test_a_record_is_said_with_its_inputs(scores: Path) -> None:
    said = describe(scores / "record.json")
    assert (said["kind"], said["of"], said["inputs"]) == ("record", "score", {"model": "ab" * 32})
    assert said["verified"] == {"by_digest": 2, "by_size": 0, "absent": 0}


def test_a_record_alone_says_what_it_could_not_verify(scores: Path, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_bytes((scores / "record.json").read_bytes())
    assert describe(tmp_path / "record.json")["verified"] == {"by_digest": 0, "by_size": 0, "absent": 2}


def test_an_unfinished_run_says_how_to_finish_it(scores: Path) -> None:
    (scores / "_manifest.json").unlink()
    said = describe(scores)
    assert (said["kind"], said["state"]) == ("scores", "unfinished")
    assert "same command" in said["to finish"]


@pytest.mark.parametrize("text", ["{}", "[]", "not json", '{"_type": "https://in-toto.io/Statement/v1"}'])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ArtifactError):
        describe(tmp_path / "a.json")


def test_an_unknown_folder_says_what_was_expected_and_what_lies_in_it(scores: Path) -> None:
    with pytest.raises(ArtifactError) as error:
        describe(scores.parent)
    assert "bundle.json" in error.value.expected
    assert f"{scores} (scores)" in error.value.fix


def test_nothing_there_is_a_fault_of_the_data(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        describe(tmp_path / "none")


def test_a_newer_schema_is_refused(scores: Path) -> None:
    manifest: dict[str, Any] = json.loads((scores / "_manifest.json").read_text())
    (scores / "_manifest.json").write_text(json.dumps({**manifest, "schema": 99}))
    with pytest.raises(ArtifactError, match="schema 99"):
        describe(scores)
