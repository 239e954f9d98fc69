"""Parquet with an image column: bytes, or ``struct<bytes, path>`` as Hugging Face datasets write it.

Each row is an item; ``label``/``labels`` give its labels (a Hugging Face ClassLabel by its name), every other column
that is no binary is kept as a string. Rows are read forward, batch by batch: a row group of any size never lies in
memory whole.

Refuses: a file that is no Parquet or is cut off. A null image is an item that is empty.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from eagleray.core.errors import DataError
from eagleray.vision.images import ImageRefused, Reason
from eagleray.vision.sources import locations
from eagleray.vision.sources.annotation import Note, Tally, merge
from eagleray.vision.sources.containers import Containers, Found, Row, too_large
from eagleray.vision.sources.options import ListOptions, Source, too_many
from eagleray.vision.sources.rows import Item, batches

USUAL_NAMES = ("image", "img", "jpg", "png", "bytes", "content")
SHARD_COLUMNS = frozenset({"id", "uri", "image", "width", "height", "format", "labels"})  # of a corpus of ours
LIST_ROWS, READ_ROWS = 4096, 64


def is_random_access(_: str) -> bool:
    """Parquet is read forward: it is ingested before it is scored."""
    return False


def scan(source: str, options: ListOptions, tally: Tally) -> Iterator[pa.RecordBatch]:
    """Lists the rows of Parquet files.

    Raises:
        DataError: A file is no Parquet, is cut off, or has no image column.
    """
    del tally  # every row is an item
    for place in locations.expand(source):
        yield from batches(_items(locations.container_of(place), options))


SOURCE = Source(scan, is_random_access)


def has_images(container: str) -> bool:
    """Whether a Parquet file has a column of images rather than of paths."""
    with _Opened(container) as opened:
        return bool(_image_columns(opened.file.schema_arrow))


def image_column(schema: pa.Schema, wanted: str, shown: str) -> str:
    """The column that holds the images.

    Raises:
        DataError: There is none, or several and none has a usual name.
    """
    found = _image_columns(schema)
    usual = [name for name in USUAL_NAMES if name in found]
    if wanted in found:
        return wanted
    if not wanted and (len(found) == 1 or usual):
        return usual[0] if usual else found[0]
    raise DataError(
        f"{shown} has {'no image column' if not found else 'several columns of bytes: ' + ', '.join(found)}"
        + (f" {wanted!r}" if wanted else ""),
        expected="one column of bytes or struct<bytes, path>" + (f", e.g. {found[0]}" if found else ""),
        fix="name it with image_column" if found else "check the file",
    )


def _image_columns(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if _is_binary(field.type) or _has_bytes(field.type)]


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _has_bytes(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_struct(kind)
        and kind.get_field_index("bytes") >= 0
        and _is_binary(kind.field(kind.get_field_index("bytes")).type)
    )


def _items(container: str, options: ListOptions) -> Iterator[Item]:
    shown = locations.shown_container(container)
    _, mtime_ns = locations.stamp_of(container)
    with _Opened(container) as opened:
        file = opened.file
        schema = file.schema_arrow
        column = image_column(schema, options.image_column, shown)
        if file.metadata.num_rows > options.max_members:
            raise too_many(shown, "rows", options.max_members, "max_members")
        is_shard = set(schema.names) >= SHARD_COLUMNS
        others = [
            field.name
            for field in schema
            if not (_is_binary(field.type) or _has_bytes(field.type))
            and not (is_shard and field.name in SHARD_COLUMNS - {"labels"})
        ]
        names = _class_names(schema)
        stored = _bytes_per_row(file, column)
        for number, row in enumerate(_other_values(opened, others)):
            for key, classes in names.items():
                if isinstance(row.get(key), int) and 0 <= row[key] < len(classes):
                    row[key] = classes[row[key]]
            note = merge(Note(), row)
            yield Item(
                uri=f"parquet://{number}::{shown}",
                kind="parquet",
                container=container,
                member=column.encode(),
                offset=number,
                stored=stored,
                mtime_ns=mtime_ns,
                labels=note.labels,
                metadata=note.metadata,
            )


def _other_values(opened: _Opened, columns: list[str]) -> Iterator[Row]:
    if not columns:
        yield from ({} for _ in range(opened.file.metadata.num_rows))
        return
    for batch in opened.batches(columns, LIST_ROWS):
        yield from batch.to_pylist()


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {
            key: list(f["names"])
            for key, f in features.items()
            if isinstance(f, dict) and f.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _bytes_per_row(file: Any, column: str) -> int:
    """The mean stored size of an image, so that slices can be cut before anything is read."""
    total = 0
    for group in range(file.metadata.num_row_groups):
        columns = file.metadata.row_group(group)
        for at in range(columns.num_columns):
            chunk = columns.column(at)
            if chunk.path_in_schema.split(".")[0] == column:
                total += chunk.total_uncompressed_size
    return int(total // max(1, file.metadata.num_rows))


class _Opened:
    """A Parquet file with our errors."""

    def __init__(self, container: str) -> None:
        import pyarrow.parquet as pq

        self._shown = locations.shown_container(container)
        self._raw = locations.open_container(container)
        try:
            self.file = pq.ParquetFile(self._raw, pre_buffer=False)
        except (pa.ArrowInvalid, OSError) as error:
            self._raw.close()
            raise self._damaged(error) from None

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def batches(self, columns: list[str], rows: int, groups: list[int] | None = None) -> Iterator[pa.RecordBatch]:
        """Record batches of some columns."""
        try:
            yield from self.file.iter_batches(batch_size=rows, columns=columns, row_groups=groups, use_threads=False)
        except (pa.ArrowInvalid, OSError) as error:
            raise self._damaged(error) from None

    def close(self) -> None:
        self.file.close()
        self._raw.close()

    def _damaged(self, error: Exception) -> DataError:
        first = str(error).strip().splitlines()
        return DataError(
            f"{self._shown} is damaged or cut off: {first[0] if first else type(error).__name__}",
            expected="a whole Parquet file",
            fix="check the file, copy it again",
        )


class _Forward:
    """Reads the images of a Parquet file row by row, forward; going back starts the row group again."""

    def __init__(self, container: str) -> None:
        self._opened = _Opened(container)
        metadata = self._opened.file.metadata
        self._starts = [0]
        for group in range(metadata.num_row_groups):
            self._starts.append(self._starts[-1] + metadata.row_group(group).num_rows)
        self._column, self._at = "", 0
        self._batch: pa.RecordBatch | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def value(self, column: str, row: int) -> bytes | None:
        """The image of a row; None when it is null.

        Raises:
            DataError: The file has no such row: it has changed since it was listed.
        """
        import bisect

        if not 0 <= row < self._starts[-1]:
            raise self._opened._damaged(IndexError(f"row {row} is gone"))
        group = bisect.bisect_right(self._starts, row) - 1
        is_same_group = self._starts[group] <= self._at < self._starts[group + 1]
        if self._batch is None or column != self._column or row < self._at or not is_same_group:
            self._batches = self._opened.batches([column], READ_ROWS, [group])
            self._column, self._at, self._batch = column, self._starts[group], next(self._batches)
        while row >= self._at + self._batch.num_rows:
            self._at += self._batch.num_rows
            self._batch = next(self._batches)
        value = self._batch.column(0)[row - self._at].as_py()
        return value.get("bytes") if isinstance(value, dict) else value  # type: ignore[no-any-return]

    def close(self) -> None:
        self._opened.close()


def read_parquet(container: str, rows: list[Row], limit: int, containers: Containers) -> Iterator[Found]:
    """Images of a Parquet file, in row order."""
    forward: _Forward = containers.get("parquet", container, _Forward)
    for row in rows:
        data = forward.value(row["member"].decode(), row["offset"])
        if data is None:
            yield ImageRefused(Reason.EMPTY, "the image is null")
        else:
            yield data if len(data) <= limit else too_large(len(data), limit)
