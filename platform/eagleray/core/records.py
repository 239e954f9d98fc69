"""Record: an in-toto Statement of what was made from what. Every flow writes one beside its output.

The statement names outputs (subjects) and inputs by digest; the predicate holds config digest, versions and counts. It
is unsigned until keys exist.
Source: in-toto Attestation Framework, Statement v1 (https://in-toto.io/Statement/v1).

Example:
    >>> record = Record(kind="score", subjects={"scores/part-0.parquet": "ab.."}, inputs={"model": "cd.."})
    >>> storage.write_json("runs/a/record.json", record.to_json())
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eagleray.core import storage
from eagleray.core.errors import ArtifactError

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_PREFIX = "https://eagleray.dev/record/"
SCHEMA = 1


@dataclass(frozen=True)
class Record:
    """What was made from what.

    Attributes:
        kind: The flow: ``ingest``, ``import``, ``score``, ...
        subjects: Output name to SHA-256 (hex).
        inputs: Input name to SHA-256 (hex).
        predicate: Config digest, versions, counts; JSON values.
        schema: Version of the predicate's shape.
    """

    kind: str
    subjects: Mapping[str, str]
    inputs: Mapping[str, str]
    predicate: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """The in-toto Statement."""
        materials = [{"uri": name, "digest": {"sha256": digest}} for name, digest in sorted(self.inputs.items())]
        return {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(self.subjects.items())],
            "predicateType": f"{PREDICATE_PREFIX}{self.kind}/v{self.schema}",
            "predicate": {"inputs": materials, **self.predicate},
        }

    @classmethod
    def from_json(cls, statement: Mapping[str, Any]) -> Record:
        """Reads a Statement back.

        Raises:
            ArtifactError: It is no Statement of ours, or of a newer schema.
        """
        kind, _, version = str(statement.get("predicateType", "")).removeprefix(PREDICATE_PREFIX).partition("/v")
        if statement.get("_type") != STATEMENT_TYPE or not version.isdigit():
            raise ArtifactError(
                "not a record of eagleray", expected=f"an in-toto Statement {STATEMENT_TYPE}", fix="check it"
            )
        if int(version) > SCHEMA:
            raise ArtifactError(
                f"a record of schema {version}", expected=f"{SCHEMA} or older", fix="use a newer eagleray"
            )
        predicate = dict(statement["predicate"])
        inputs = {item["uri"]: item["digest"]["sha256"] for item in predicate.pop("inputs", [])}
        subjects = {item["name"]: item["digest"]["sha256"] for item in statement["subject"]}
        return cls(kind=kind, subjects=subjects, inputs=inputs, predicate=predicate, schema=int(version))


def read_record(path: str | Path) -> Record:
    """Reads ``record.json``.

    Raises:
        ArtifactError: It is missing, not JSON, or no record.
    """
    try:
        return Record.from_json(storage.read_json(path))
    except FileNotFoundError:
        raise ArtifactError(
            f"no record at {path}", expected="record.json of a finished run", fix="check the path"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path} is no record: {error}", expected="record.json as written", fix="run again"
        ) from None
