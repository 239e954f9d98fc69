"""A listing: CSV, JSONL or Parquet with a column of paths (relative to the listing) or URIs.

``label``/``labels`` give the labels, every other column is kept as a string. A row that names nothing that may be read
is an item too, and unreadable: each row is accounted for.

Refuses: a table without a column of paths. URI schemes other than those of ListOptions.schemes are not called.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import pyarrow as pa

from eagleray.core.errors import DataError
from eagleray.vision.sources import locations
from eagleray.vision.sources.annotation import PATH_COLUMNS, Note, Tally, merge, table_rows
from eagleray.vision.sources.options import ListOptions, Source
from eagleray.vision.sources.rows import Item, batches, text_of


def is_random_access(source: str) -> bool:
    """A local listing of local paths is scored in place."""
    if locations.is_remote(source):
        return False
    return all(
        not locations.is_remote(str(row.get(column) or ""))
        for place in locations.expand(source)
        for column, row in _rows(place, "")
    )


def scan(source: str, options: ListOptions, tally: Tally) -> Iterator[pa.RecordBatch]:
    """Lists what the rows of a listing name.

    Raises:
        DataError: It cannot be read or has no column of paths.
    """
    del tally  # every row is an item
    for place in locations.expand(source):
        yield from batches(_items(place, options))


SOURCE = Source(scan, is_random_access)


def _rows(source: str, wanted: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with the name of the path column."""
    container = locations.container_of(source)
    shown = locations.shown_container(container)
    column = ""
    with locations.open_container(container) as file:
        is_parquet = file.read(4) == b"PAR1"
        file.seek(0)
        name = "listing.parquet" if is_parquet else PurePath(container).name
        for row in table_rows(file, name, shown):
            if not column or column not in row:
                names = (wanted,) if wanted else PATH_COLUMNS
                column = next((name for name in names if name in row), "")
            if not column:
                raise DataError(
                    f"{shown} has no column of paths (it has {', '.join(map(str, row)) or 'no columns'})",
                    expected=f"one of {', '.join(PATH_COLUMNS)}",
                    fix="name the column with image_column",
                )
            yield column, row


def _items(source: str, options: ListOptions) -> Iterator[Item]:
    shown = locations.shown_container(locations.container_of(source))
    for number, (column, row) in enumerate(_rows(source, options.image_column)):
        value = str(row.get(column) or "").strip("\r\n")
        note = merge(Note(), {key: item for key, item in row.items() if key != column})
        base = Item("", "", "", b"", labels=note.labels, metadata=note.metadata)
        yield (
            _item(base, source, value, options)
            if value
            else base._replace(uri=f"listing://{number}::{shown}", kind="refused", member=b"the row names no path")
        )


def _item(base: Item, source: str, value: str, options: ListOptions) -> Item:
    target = _target(source, value)
    if not locations.is_remote(target):
        return _local_item(base, target)
    base = base._replace(uri=text_of(target))
    scheme = target.partition("://")[0].lower()
    if scheme in options.schemes:
        return base._replace(kind="remote", member=target.encode("utf-8", "surrogateescape"))
    return base._replace(kind="refused", member=f"the scheme {scheme} is not among those allowed".encode())


def _target(source: str, value: str) -> str:
    """A row's value as a URI or an absolute path."""
    if locations.SCHEME.match(value):
        return value
    if locations.is_remote(source):
        return f"{source.rpartition('/')[0]}/{value}"
    return os.path.normpath(os.path.join(os.path.dirname(locations.local_path(source)), value))


def _local_item(base: Item, target: str) -> Item:
    path = locations.local_path(target)
    try:
        stat = os.stat(path)
        size, mtime_ns = stat.st_size, stat.st_mtime_ns
    except (OSError, ValueError):  # ValueError: a NUL in the name; reading it says why it cannot be read
        size, mtime_ns = -1, 0
    member = os.fsencode(path)
    return base._replace(uri=f"file://{text_of(member)}", kind="file", member=member, size=size, mtime_ns=mtime_ns)
