"""A Record goes to an in-toto Statement and back; what is no record is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from eagleray.core import storage
from eagleray.core.errors import ArtifactError
from eagleray.core.records import STATEMENT_TYPE, Record, read_record


def test_round_trip(tmp_path: Path) -> None:
    record = Record(kind="score", subjects={"a": "1" * 64}, inputs={"model": "2" * 64}, predicate={"images_in": 3})
    storage.write_json(tmp_path / "record.json", record.to_json())
    assert read_record(tmp_path / "record.json") == record
    assert record.to_json()["_type"] == STATEMENT_TYPE
    assert record.to_json()["subject"] == [{"name": "a", "digest": {"sha256": "1" * 64}}]


@pytest.mark.parametrize("text", ["{", "{}", '{"_type": "https://in-toto.io/Statement/v1"}', "[]"])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(ArtifactError):
        read_record(tmp_path / "record.json")
    with pytest.raises(ArtifactError, match="no record at"):
        read_record(tmp_path / "none.json")


def test_a_newer_schema_is_refused() -> None:
    newer = {**Record("score", {}, {}).to_json(), "predicateType": "https://eagleray.dev/record/score/v99"}
    with pytest.raises(ArtifactError, match="schema 99"):
        Record.from_json(newer)
