"""What names and metadata files say about an image: class folders, splits, and ``metadata.{csv,jsonl,parquet}``.

The rules, the same for every source:

- the label is the first folder below the source's root, after one wrapping folder that holds everything (and folders of
  its own) and one leading ``train``, ``val``, ``validation`` or ``test``, which becomes ``split`` (validation -> val);
- a ``metadata.{csv,jsonl,parquet}`` has a ``file_name`` relative to its own folder; its ``label`` (one) or ``labels``
  (a JSON list, or names joined by ``;``) replaces the folder's, every other column is kept as a string; the deepest
  file wins;
- names that start with a dot, folders too, and ``metadata.*`` are no items.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from eagleray.core.errors import DataError
from eagleray.vision.sources.rows import as_text

SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
PATH_COLUMNS = ("file_name", "path", "uri", "url", "filename", "file", "image")
LABEL_COLUMNS = ("label", "labels")
RESERVED = frozenset({"id", "uri", "image", "width", "height", "format", "labels"})  # a corpus's own columns
MAX_METADATA_BYTES = 4 << 30
csv.field_size_limit(1 << 24)  # a caption or a polygon may be long; the default stops at 128 KiB


@dataclass
class Tally:
    """What a listing met besides items; goes into the manifest.

    Attributes:
        skipped_special: Links, devices, pipes and the like: no regular files.
        metadata_rows: Rows of metadata files.
        metadata_matched: Those that name an item.
    """

    skipped_special: int = 0
    metadata_rows: int = 0
    metadata_matched: int = 0

    def add(self, other: Tally) -> None:
        """Adds another listing's counts."""
        self.skipped_special += other.skipped_special
        self.metadata_rows += other.metadata_rows
        self.metadata_matched += other.metadata_matched


@dataclass(frozen=True)
class Note:
    """What is known about one image besides its bytes."""

    labels: tuple[str, ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()


def is_item(parts: Sequence[str]) -> bool:
    """Whether a name counts as an item: no dot files, nothing inside dot folders, no ``metadata.*``."""
    hidden = any(part.startswith(".") and part not in (".", "..") for part in parts)
    return bool(parts) and not hidden and not parts[-1].startswith("metadata.")


def is_metadata(parts: Sequence[str]) -> bool:
    """Whether a name is a metadata file that is read."""
    return bool(parts) and parts[-1] in METADATA_NAMES and is_item((*parts[:-1], "x"))


def parts_of(name: str) -> tuple[str, ...]:
    """The folders and the base name of a member's name; empty, ``.`` and ``..`` parts say nothing and are dropped."""
    return tuple(part for part in name.split("/") if part not in ("", ".", ".."))


class Wrapper:
    """Finds the one folder that wraps everything, over all names of an archive."""

    def __init__(self) -> None:
        self._tops: set[str] = set()
        self._has_folders = False

    def see(self, parts: Sequence[str]) -> None:
        """Takes one item's name into account."""
        if len(self._tops) < 2:
            self._tops.add(parts[0] if len(parts) > 1 else "")
        self._has_folders = self._has_folders or len(parts) > 2

    @property
    def name(self) -> str:
        """The wrapping folder, or an empty string."""
        top = next(iter(self._tops)) if len(self._tops) == 1 else ""
        return top if self._has_folders and top.lower() not in SPLITS else ""


def note_of_folders(folders: Sequence[str], wrapper: str, mode: str = "folder") -> Note:
    """Label and split of an item by the folders it lies in.

    Args:
        folders: From the source's root down.
        wrapper: The wrapping folder, or empty.
        mode: ``"folder"``, or ``"none"`` to take no label from folders.
    """
    rest = list(folders)
    if wrapper and rest and rest[0] == wrapper:
        rest = rest[1:]
    split = SPLITS.get(rest[0].lower()) if rest else None
    if split:
        rest = rest[1:]
    labels = (rest[0],) if rest and mode == "folder" else ()
    return Note(tuple(as_text(label) or "" for label in labels), (("split", split),) if split else ())


def merge(note: Note, row: Mapping[str, Any]) -> Note:
    """A note with what a metadata row says; the row wins, an empty value says nothing."""
    labels = labels_of(row)
    metadata = dict(note.metadata)
    for key, value in row.items():
        if key in LABEL_COLUMNS or key is None:
            continue
        text = as_text(value)
        if text is not None:
            metadata[column_name(str(key))] = text
    return Note(labels or note.labels, tuple(sorted(metadata.items())))


def column_name(key: str) -> str:
    """A metadata key as a corpus column; a corpus's own names get ``meta_`` in front."""
    key = as_text(key.strip()) or "unnamed"
    return f"meta_{key}" if key in RESERVED else key


def labels_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels of a metadata row: ``label``, then ``labels``, each once."""
    found: list[str] = []
    values = [*_listed(row.get("label")), *_listed(row.get("labels"), separator=";")]
    for value in values:
        text = as_text(value)
        if text is not None and text not in found:
            found.append(text)
    return tuple(found)


def _listed(value: Any, separator: str | None = None) -> list[Any]:
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = None
        if isinstance(parsed, list):
            return parsed
    return [part.strip() for part in value.split(separator)] if isinstance(value, str) and separator else [value]


@dataclass
class MetadataTable:
    """A metadata file in memory: columns of strings, found by a 64-bit hash of the path and then by the path itself.

    About 8 bytes a row besides the strings, so a metadata file of ten million rows fits on a laptop.
    """

    place: str
    rows: Any  # pyarrow Table of strings; labels as JSON text
    _order: Any = field(init=False, repr=False)
    _hashes: Any = field(init=False, repr=False)
    matched: int = 0

    def __post_init__(self) -> None:
        names = self.rows.column("file_name")
        hashes = np.fromiter((hash(name.as_py()) for name in names), dtype=np.int64, count=len(names))
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def find(self, relative: str) -> dict[str, Any] | None:
        """The row that names a path, without its ``file_name``; the last one wins when several do."""
        key = path_key(relative)
        value = np.int64(hash(key))
        low, high = np.searchsorted(self._hashes, value, "left"), np.searchsorted(self._hashes, value, "right")
        for at in self._order[low:high][::-1]:
            row: dict[str, Any] = self.rows.slice(int(at), 1).to_pylist()[0]
            if row.pop("file_name") == key:
                self.matched += 1
                return row
        return None


def path_key(name: str) -> str:
    """A path as it is compared: no leading ``./``, no empty parts, Unicode composed (macOS writes it decomposed)."""
    text = "/".join(part for part in name.split("/") if part not in ("", "."))
    return as_text(text if text.isascii() else unicodedata.normalize("NFC", text)) or ""


def read_metadata(file: IO[bytes], name: str, place: str) -> MetadataTable:
    """Reads a metadata file.

    Args:
        file: Its bytes.
        name: Its base name; the suffix says the format.
        place: Its uri, for messages.

    Raises:
        DataError: It cannot be parsed, or has no ``file_name``.
    """
    import pyarrow as pa

    columns: dict[str, list[str | None]] = {"file_name": []}
    for number, row in enumerate(table_rows(file, name, place)):
        key = next((row[column] for column in ("file_name", "filename", "path") if row.get(column)), None)
        if key is None:
            raise DataError(
                f"{place} has no file_name in row {number + 1}",
                expected="a column file_name, relative to the metadata file's folder",
                fix="add it, or give the file another name than metadata.*",
            )
        _put_row(columns, number, {**row, "file_name": path_key(str(key))})
    num_rows = len(columns["file_name"])
    arrays = {key: pa.array(values + [None] * (num_rows - len(values)), pa.string()) for key, values in columns.items()}
    return MetadataTable(place, pa.table(arrays))


def _put_row(columns: dict[str, list[str | None]], number: int, row: Mapping[str, Any]) -> None:
    for key, value in row.items():
        column = columns.setdefault(str(as_text(key) or ""), [])
        column.extend([None] * (number - len(column)))
        column.append(as_text(value))


def table_rows(file: IO[bytes], name: str, place: str) -> Iterator[dict[str, Any]]:
    """The rows of a CSV, JSONL or Parquet table as dicts, streamed.

    Raises:
        DataError: It is not what its suffix says.
    """
    try:
        if name.endswith(".parquet"):
            yield from _parquet_rows(file)
        elif name.endswith((".jsonl", ".ndjson")):
            yield from _json_rows(file)
        else:
            yield from _csv_rows(file, "\t" if name.endswith(".tsv") else ",")
    except (ValueError, csv.Error) as error:
        raise DataError(
            f"{place} cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            expected="CSV with a header line, one JSON object a line, or Parquet",
            fix="mend the file",
        ) from None


def _csv_rows(file: IO[bytes], delimiter: str) -> Iterator[dict[str, Any]]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        reader = csv.DictReader(text, delimiter=delimiter, restkey="_more", strict=True)
        for row in reader:
            row.pop("_more", None)
            yield row
    finally:
        text.detach()


def _json_rows(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    for line in file:
        if line.strip():
            row = json.loads(line.decode("utf-8", "surrogateescape"))
            if not isinstance(row, dict):
                raise ValueError(f"a line holds a {type(row).__name__}, not an object")
            yield row


def _parquet_rows(file: IO[bytes], columns: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(file).iter_batches(batch_size=4096, columns=columns and list(columns)):
        yield from batch.to_pylist()
